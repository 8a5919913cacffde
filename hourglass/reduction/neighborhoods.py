"""
Which tokens meet which centres, as small dense matrix products.

Each token has a home cell in the grid of centres and meets the centres at most ``radius`` cells from it, along rows
and columns. The grid is cut into square tiles of cells; a tile's tokens meet the centres of its patch, the tile and
``radius`` cells around it, and a mask leaves to each token its own neighbourhood. Time and memory are so many tokens
times a constant, whatever the size of the map, and the work is done by batched matrix products.

Letters: B batch, H x W tokens, h x w centres, C channels; T tiles, n tokens a tile (padded), m centres a patch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class _Axis(NamedTuple):
    """One axis of a :class:`Neighborhoods`."""

    cells: int  # of the grid
    tile: int  # cells a tile
    tiles: int
    blocks: int  # tiles' lengths in a patch: 1 where a single tile holds all cells, else 2
    before: int  # cells of padding before the first
    gather: Tensor  # (tiles * tokens a tile,) the token at each place of a tile; places left over repeat a token
    scatter: Tensor  # (tokens,) the place of each token
    real: Tensor  # (tiles, tokens a tile) False for a place left over
    reach: Tensor  # (tiles, tokens a tile, cells a patch) True for a centre in the token's neighbourhood


def _axis(length: int, cells: int, radius: int, device: torch.device) -> _Axis:
    # Patches of two tiles' length hold the tile and radius cells on both sides where a tile has 2 * radius cells.
    tile = max(4, 2 * radius)
    if cells <= 3 * tile:  # so few that meeting all is no more work
        tile, tiles, blocks, before = cells, 1, 1, 0
    else:
        tiles, blocks, before = -(-cells // tile), 2, radius

    token = torch.arange(length, device=device)
    home = _home(length, cells, device)
    tile_of_token = home // tile
    # Token i is at home before cell c where i * cells < c * length. The first tile has most tokens.
    bounds = (torch.arange(tiles + 1, device=device) * tile * length + cells - 1) // cells
    first, end = bounds[:-1], bounds[1:].clamp(max=length)
    place = torch.arange(-(-min(tile, cells) * length // cells), device=device)
    gather = torch.minimum(first[:, None] + place, end[:, None] - 1)
    real = first[:, None] + place < end[:, None]
    scatter = tile_of_token * len(place) + token - first[tile_of_token]

    tile_start = torch.arange(tiles, device=device)[:, None, None] * tile
    cell = tile_start - before + torch.arange(blocks * tile, device=device)
    reach = ((cell >= 0) & (cell < cells)).expand(tiles, len(place), -1)
    reach = reach & ((cell - home[gather][..., None]).abs() <= radius)
    return _Axis(cells, tile, tiles, blocks, before, gather.flatten(), scatter, real, reach)


class Neighborhoods:
    """
    Args:
        size: (H, W) of the map.
        grid: (h, w) of the centres.
        radius: how many cells from home a token meets centres.
        device: of the index tensors.
    """

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device):
        self._rows = _axis(size[0], grid[0], radius, device)
        self._columns = _axis(size[1], grid[1], radius, device)
        rows, columns = self._rows, self._columns
        real = rows.real[:, None, :, None] & columns.real[None, :, None, :]
        reach = rows.reach[:, None, :, None, :, None] & columns.reach[None, :, None, :, None, :]
        tiles = rows.tiles * columns.tiles
        #: (T, n, m) True where a token meets a centre.
        self.reach = reach.reshape(tiles, real.shape[2] * real.shape[3], -1)
        #: (T, n, 1) False for a place that holds no token of its own.
        self.real = real.reshape(tiles, -1, 1)

    def tile_tokens(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, T, n, C)"""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = tokens.shape
        if rows.tiles > 1:
            tokens = tokens[:, rows.gather]
        if columns.tiles > 1:
            tokens = tokens[:, :, columns.gather]
        tokens = tokens.reshape(batch, rows.tiles, -1, columns.tiles, len(columns.gather) // columns.tiles, channels)
        return tokens.transpose(2, 3).reshape(batch, rows.tiles * columns.tiles, -1, channels)

    def untile_tokens(self, tiled: Tensor) -> Tensor:
        """(B, T, n, C) -> (B, H, W, C)"""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = tiled.shape
        tokens = tiled.view(batch, rows.tiles, columns.tiles, len(rows.gather) // rows.tiles, -1, channels)
        tokens = tokens.transpose(2, 3).reshape(batch, len(rows.gather), len(columns.gather), channels)
        if rows.tiles > 1:
            tokens = tokens[:, rows.scatter]
        if columns.tiles > 1:
            tokens = tokens[:, :, columns.scatter]
        return tokens

    def patches(self, centers: Tensor) -> Tensor:
        """The centres that each tile's tokens may meet: (B, h, w, C) -> (B, T, m, C), 0 beyond the grid."""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = centers.shape
        pad = [side for axis in (columns, rows) for side in (axis.before, _padded(axis) - axis.cells - axis.before)]
        blocks = torch.nn.functional.pad(centers, (0, 0, *pad))
        blocks = blocks.view(batch, _padded(rows) // rows.tile, rows.tile, -1, columns.tile, channels)
        patches = blocks.new_empty(
            batch, rows.tiles, columns.tiles, rows.blocks, rows.tile, columns.blocks, columns.tile, channels
        )
        for i in range(rows.blocks):
            for j in range(columns.blocks):
                part = blocks[:, i : i + rows.tiles, :, j : j + columns.tiles]
                patches[:, :, :, i, :, j] = part.transpose(2, 3)
        return patches.view(batch, rows.tiles * columns.tiles, -1, channels)

    def sum_patches(self, patches: Tensor) -> Tensor:
        """Add up what the tiles have for each centre: (B, T, m, C) -> (B, h, w, C)"""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = patches.shape
        patches = patches.view(
            batch, rows.tiles, columns.tiles, rows.blocks, rows.tile, columns.blocks, columns.tile, channels
        )
        total = patches.new_zeros(
            batch, _padded(rows) // rows.tile, rows.tile, _padded(columns) // columns.tile, columns.tile, channels
        )
        for i in range(rows.blocks):
            for j in range(columns.blocks):
                total[:, i : i + rows.tiles, :, j : j + columns.tiles] += patches[:, :, :, i, :, j].transpose(2, 3)
        total = total.view(batch, _padded(rows), _padded(columns), channels)
        return total[:, rows.before : rows.before + rows.cells, columns.before : columns.before + columns.cells]


def _padded(axis: _Axis) -> int:
    return (axis.tiles + axis.blocks - 1) * axis.tile


def _home(length: int, cells: int, device: torch.device) -> Tensor:
    """(length,) the cell of each token: nearest-neighbour upsampling of the cells' numbers."""
    return torch.arange(length, device=device) * cells // length


def at_home(centers: Tensor, size: tuple[int, int]) -> Tensor:
    """The home centre of each token of a map of ``size`` (H, W): (B, h, w, C) -> (B, H, W, C)."""
    rows, columns = (_home(length, cells, centers.device) for length, cells in zip(size, centers.shape[1:3]))
    return centers[:, rows][:, :, columns]


@lru_cache(maxsize=64)
def neighborhoods(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Neighborhoods:
    """A :class:`Neighborhoods`, made once: it depends on sizes alone."""
    with torch.inference_mode(False), torch.no_grad():
        return Neighborhoods(size, grid, radius, device)
