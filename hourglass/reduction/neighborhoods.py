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
import torch.nn.functional as F
from torch import Tensor

from hourglass.operators import is_exporting, is_symbolic

# Numbers of a tensor that tiles are worked on in, on CPUs: 16 MiB of them stay in memory that the process has already.
PART = 1 << 22


class _Axis(NamedTuple):
    """One axis of a :class:`Neighborhoods`."""

    cells: int  # of the grid
    tile: int  # cells a tile
    tiles: int
    blocks: int  # tiles' lengths in a patch: 1 where a single tile holds all cells, else 2
    before: int  # cells of padding before the first
    bounds: list[int]  # the first token of each tile, and the end
    gather: Tensor  # (tiles, tokens a tile) the token at each place of a tile; places left over repeat a token
    scatter: Tensor  # (tokens,) the place of each token
    real: Tensor  # (tiles, tokens a tile) False for a place left over
    reach: Tensor  # (tiles, tokens a tile, cells a patch) True for a centre in the token's neighbourhood


def _axis(length: int, cells: int, radius: int, device: torch.device) -> _Axis:
    # Patches of two tiles' length hold the tile and radius cells on both sides where a tile has 2 * radius cells.
    tile = max(4, 2 * radius)
    if cells <= 3 * tile or is_symbolic(length):  # so few that meeting all is no more work
        tile, tiles, blocks, before = cells, 1, 1, 0
    else:
        tiles, blocks, before = -(-cells // tile), 2, radius

    if tiles == 1:
        home = _home(length, cells, device)
        gather = torch.arange(length, device=device)
        reach = (torch.arange(cells, device=device) - home[:, None]).abs() <= radius
        real = torch.ones(1, length, dtype=torch.bool, device=device)
        return _Axis(cells, tile, tiles, blocks, before, [0, length], gather[None], gather, real, reach[None])

    # Token i is at home before cell c where i * cells < c * length.
    bounds = [min(length, -(-t * tile * length // cells)) for t in range(tiles + 1)]
    first, end = torch.tensor(bounds[:-1], device=device), torch.tensor(bounds[1:], device=device)
    place = torch.arange(max(b - a for a, b in zip(bounds, bounds[1:])), device=device)
    gather = torch.minimum(first[:, None] + place, end[:, None] - 1)
    real = first[:, None] + place < end[:, None]
    home = _home(length, cells, device)
    tile_of_token = home // tile
    scatter = tile_of_token * len(place) + torch.arange(length, device=device) - first[tile_of_token]

    tile_start = torch.arange(tiles, device=device)[:, None, None] * tile
    cell = tile_start - before + torch.arange(blocks * tile, device=device)
    reach = ((cell >= 0) & (cell < cells)).expand(tiles, len(place), -1)
    reach = reach & ((cell - home[gather][..., None]).abs() <= radius)
    return _Axis(cells, tile, tiles, blocks, before, bounds, gather, scatter, real, reach)


class Neighborhoods:
    """
    Tiles are worked on in parts, so many rows of them (a slice) at a time.

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
        n, tiles = real.shape[2] * real.shape[3], rows.tiles * columns.tiles
        self._reach = reach.reshape(tiles, n, -1)
        self._index = self._numbers(grid, device)
        self._real = real.reshape(tiles, n, 1)

    def _numbers(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(T, m) the number of each centre of a patch; 0 beyond the grid."""
        numbers = torch.arange(grid[0] * grid[1], device=device).view(1, *grid, 1)
        return self.patches(self.blocks(numbers), slice(0, self._rows.tiles))[0, ..., 0]

    def index_of(self, places: Tensor, part: slice) -> Tensor:
        """The numbers of the centres at places of patches, int64: (B, T, n, k) -> (B, T, n, k)."""
        index = self._index[self._tiles(part)][None, :, None].expand(*places.shape[:3], -1)
        return index.gather(-1, places)

    @property
    def pairs(self) -> int:
        """How many pairs of a token and a centre are compared."""
        return self._reach.numel()

    def parts(self, tokens: Tensor) -> list[slice]:
        """The rows of tiles in parts, for a map (B, H, W, C)."""
        rows, columns = self._rows, self._columns
        if tokens.device.type != "cpu" or is_exporting():
            return [slice(0, rows.tiles)]
        per_row = tokens.shape[0] * columns.tiles * max(self._reach.shape[1:]) * tokens.shape[3]
        step = max(1, PART // per_row)
        return [slice(first, min(first + step, rows.tiles)) for first in range(0, rows.tiles, step)]

    def reach(self, part: slice) -> Tensor:
        """(T, n, m) True where a token meets a centre."""
        return self._reach[self._tiles(part)]

    def real(self, part: slice) -> Tensor:
        """(T, n, 1) False for a place that holds no token of its own."""
        return self._real[self._tiles(part)]

    def _tiles(self, part: slice) -> slice:
        return slice(part.start * self._columns.tiles, part.stop * self._columns.tiles)

    def tile_tokens(self, tokens: Tensor, part: slice) -> Tensor:
        """(B, H, W, C) -> (B, T, n, C)"""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = tokens.shape
        if rows.tiles > 1:
            tokens = tokens[:, rows.gather[part].flatten()]
        if columns.tiles > 1:
            tokens = tokens[:, :, columns.gather.flatten()]
        count = part.stop - part.start
        tokens = tokens.reshape(batch, count, -1, columns.tiles, columns.gather.shape[1], channels)
        return tokens.transpose(2, 3).reshape(batch, count * columns.tiles, -1, channels)

    def untile_tokens(self, tiled: Tensor, part: slice) -> Tensor:
        """(B, T, n, C) -> (B, rows of the part, W, C)"""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = tiled.shape
        tiled = tiled.view(batch, -1, columns.tiles, rows.gather.shape[1], columns.gather.shape[1], channels)
        tokens = tiled.transpose(2, 3).reshape(batch, -1, columns.gather.numel(), channels)
        if rows.tiles > 1:
            first, end = rows.bounds[part.start], rows.bounds[part.stop]
            tokens = tokens[:, rows.scatter[first:end] - part.start * rows.gather.shape[1]]
        return tokens[:, :, columns.scatter] if columns.tiles > 1 else tokens

    def blocks(self, centers: Tensor) -> Tensor:
        """What patches are taken from: (B, h, w, C) -> (B, rows of blocks, tile, columns of blocks, tile, C)."""
        rows, columns = self._rows, self._columns
        batch, _, _, channels = centers.shape
        pad = [side for axis in (columns, rows) for side in (axis.before, _padded(axis) - axis.cells - axis.before)]
        return F.pad(centers, (0, 0, *pad)).view(
            batch, _padded(rows) // rows.tile, rows.tile, -1, columns.tile, channels
        )

    def unblock(self, blocks: Tensor) -> Tensor:
        """The way back of :meth:`blocks`."""
        rows, columns = self._rows, self._columns
        centers = blocks.reshape(blocks.shape[0], _padded(rows), _padded(columns), -1)
        return centers[:, rows.before : rows.before + rows.cells, columns.before : columns.before + columns.cells]

    def patches(self, blocks: Tensor, part: slice) -> Tensor:
        """The centres that each tile's tokens may meet, 0 beyond the grid: (B, T, m, C)."""
        rows, columns = self._rows, self._columns
        batch, channels, count = blocks.shape[0], blocks.shape[-1], part.stop - part.start
        if rows.blocks == columns.blocks == 1:
            return blocks.reshape(batch, 1, -1, channels)
        if is_exporting():  # a program has no memory to write to
            of_rows = [[self._block(blocks, part, i, j) for j in range(columns.blocks)] for i in range(rows.blocks)]
            patches = torch.stack([torch.stack(of_row, dim=4) for of_row in of_rows], dim=3)
            return patches.view(batch, count * columns.tiles, -1, channels)
        patches = blocks.new_empty(
            batch, count, columns.tiles, rows.blocks, rows.tile, columns.blocks, columns.tile, channels
        )
        for i in range(rows.blocks):
            for j in range(columns.blocks):
                patches[:, :, :, i, :, j] = self._block(blocks, part, i, j)
        return patches.view(batch, count * columns.tiles, -1, channels)

    def add_patches(self, blocks: Tensor, patches: Tensor, part: slice) -> Tensor:
        """
        The blocks and what tiles have for each centre (B, T, m, C), added up: in place, unless a program is exported.
        """
        rows, columns = self._rows, self._columns
        batch, _, _, channels = patches.shape
        patches = patches.view(batch, -1, columns.tiles, rows.blocks, rows.tile, columns.blocks, columns.tile, channels)
        for i in range(rows.blocks):
            for j in range(columns.blocks):
                block = patches[:, :, :, i, :, j].transpose(2, 3)
                if is_exporting():
                    around = (0, 0, 0, 0, j, columns.blocks - 1 - j, 0, 0, i, rows.blocks - 1 - i)
                    blocks = blocks + F.pad(block, around)
                else:
                    taken = blocks[:, part.start + i : part.stop + i, :, j : j + columns.tiles]
                    taken += block
        return blocks

    def _block(self, blocks: Tensor, part: slice, i: int, j: int) -> Tensor:
        """Of each tile's patch, the block in row i and column j: (B, tiles of rows, tiles of columns, ...)."""
        return blocks[:, part.start + i : part.stop + i, :, j : j + self._columns.tiles].transpose(2, 3)


def _padded(axis: _Axis) -> int:
    return (axis.tiles + axis.blocks - 1) * axis.tile


def _home(length: int, cells: int, device: torch.device) -> Tensor:
    """(length,) the cell of each token: nearest-neighbour upsampling of the cells' numbers."""
    return torch.arange(length, device=device) * cells // length


def home_centers(centers: Tensor, size: tuple[int, int], part: slice = slice(None)) -> Tensor:
    """The home centre of each token in some rows of a map of ``size`` (H, W): (B, h, w, C) -> (B, rows, W, C)."""
    rows, columns = (_home(length, cells, centers.device) for length, cells in zip(size, centers.shape[1:3]))
    return centers[:, rows[part]][:, :, columns]


def neighborhoods(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Neighborhoods:
    """A :class:`Neighborhoods`, made once: it depends on sizes alone."""
    if is_exporting():  # its tensors are the program's, and hold no values
        return Neighborhoods(size, grid, radius, device)
    return _neighborhoods(size, grid, radius, device)


@lru_cache(maxsize=64)
def _neighborhoods(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Neighborhoods:
    with torch.inference_mode(False), torch.no_grad():
        return Neighborhoods(size, grid, radius, device)
