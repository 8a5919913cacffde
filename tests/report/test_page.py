"""The page, of comparisons that are made up: what is hard to lay out, and what must not be lost on the way."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import Metadata
from PIL import Image
from pycocotools import mask as rle

from hourglass import InputError, Plan, TokenClustering
from hourglass.evaluation import to_json
from hourglass.evaluation.agreement import OutputRecorder
from hourglass.evaluation.compare import Comparison, Measurement
from hourglass.evaluation.timing import Run
from hourglass.report import MARK, check_report
from hourglass.report.drawing import accuracy_and_time, scaled_size
from hourglass.report.page import Material, write_page
from hourglass.report.tokens import Tokens
from tests.pages import Page, check_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# What a reader of the page would run into: markup, a name that is long, and 80 of them.
CLASSES = ['<b>car</b> & "co"', "a class with a name that is far too long for any column of any table"]
CLASSES += [f"class number {i}" for i in range(2, 80)]


def outputs(size, count: int, seed: int, drop: float) -> tuple[dict, dict]:
    """Of two models: discs, of which the second loses some, moves some and finds some of another class."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[: size[0], : size[1]]
    pair = [{"size": size, "scores": [], "classes": [], "bbox": [], "segm": []} for _ in range(2)]
    for _ in range(count):
        radius = int(rng.integers(3, 9))
        y, x = rng.integers(10, size[0] - 10), rng.integers(10, size[1] - 10)
        kind, fate = int(rng.integers(len(CLASSES))), rng.random()
        for i, kept in enumerate(pair):
            if i and fate < drop:
                continue
            if i and fate < 2 * drop:
                kind = (kind + 1) % len(CLASSES)
            elif i and fate < 3 * drop:
                x += radius // 2
            top, left = max(0, y - radius), max(0, x - radius)
            part = (slice(top, y + radius), slice(left, x + radius))
            mask = np.zeros(size, np.uint8, order="F")
            mask[part] = (rows[part[0]] - y) ** 2 + (columns[:, part[1]] - x) ** 2 < radius**2
            kept["segm"].append(rle.encode(mask))
            kept["bbox"].append(rle.toBbox(kept["segm"][-1]))
            kept["scores"].append(0.5 + 0.5 * rng.random())
            kept["classes"].append(kind)
    for kept in pair:
        kept["scores"], kept["classes"] = np.array(kept["scores"], float), np.array(kept["classes"], int)
        kept["bbox"] = np.array(kept["bbox"], float).reshape(-1, 4)
    return pair[0], pair[1]


def annotations(kept: dict) -> list[dict]:
    return [
        {"bbox": list(box), "bbox_mode": 1, "category_id": int(number), "segmentation": mask}
        for box, number, mask in zip(kept["bbox"], kept["classes"], kept["segm"])
    ]


def comparison(images: int) -> Comparison:
    measurements = {}
    for i, name in enumerate(("unmodified", "fast attention", "expedited")):
        runs = {part: np.full(images, 10.0 - i) for part in Run._fields}
        samples = np.linspace(40, 45, 20) - i
        classes = {name: samples + number / 10 for number, name in enumerate(CLASSES)}
        measurements[name] = Measurement(
            {"segm": {"AP": float(samples[0]), "AP50": 60.0}},
            {"segm.AP": samples},
            runs,
            1.0,
            1.0,
            {"segm.AP": classes},
            ("a warning",),
        )
    return Comparison(measurements)


def material(folder: Path, sizes: list[tuple[int, int]], counts: list[int], labels: bool = True, **options) -> Material:
    recorders, records = (OutputRecorder(500), OutputRecorder(500)), []
    for number, (size, count) in enumerate(zip(sizes, counts)):
        pair = outputs(size, count, number, 0.1)
        for recorder, kept in zip(recorders, pair):
            recorder.outputs[number] = kept
        path = folder / f"image {number} of #1 & 'others'.png"
        Image.fromarray(np.full((*size, 3), 60 + 20 * number, np.uint8)).save(path)
        record = {"file_name": str(path), "image_id": number}
        records.append({**record, "annotations": annotations(pair[0])[1:]} if labels else record)
    compared = comparison(len(sizes))
    plan = Plan(TokenClustering((4, 4)), 1, 3).describe()
    document = to_json(compared, dataset="made <up>", device="cpu", dtype="float32", plan=plan)
    labels_of_tokens = np.arange(64).reshape(8, 8) // 2
    tokens = Tokens((8, 8), labels_of_tokens, False, None, 4, (16, 16), (128, 128), 32, (1, 2))
    page_material = Material(
        document,
        compared,
        ([], []),
        recorders,
        records,
        Metadata(thing_classes=CLASSES),
        lambda record: np.asarray(Image.open(record["file_name"])),
        lambda record: tokens,
        0.5,
        24,
    )
    return page_material._replace(**options)


def browse(path: Path, width: int, choice: str = "") -> dict:
    """What a browser makes of the page in a window of that many pixels."""
    probe = path.with_name("probe.html")
    script = """
        <script>addEventListener("load", () => { document.title = "seen " + JSON.stringify({
            width: document.documentElement.scrollWidth, window: innerWidth,
            broken: [...document.images].filter((image) => image.complete && !image.naturalWidth).length,
            cards: [...document.querySelectorAll(".card")].map((card) => !card.hidden),
            shown: document.getElementById("shown").textContent,
            changes: [...document.querySelectorAll(".change:not([hidden])")].map((row) => row.dataset.kind),
        }); });</script></body>"""
    probe.write_text(path.read_text(encoding="utf-8").replace("</body>", script).replace('loading="lazy"', ""))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={path.parent.parent / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    try:
        done = subprocess.run([*command, probe.as_uri() + choice], capture_output=True, text=True, timeout=120)
    finally:
        probe.unlink()
    assert "<title>seen " in done.stdout, done.stderr[-2000:]
    title = done.stdout.split("<title>seen ", 1)[1].split("</title>")[0]
    return json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Path:
    """Nothing in an image, one of 8,000 pixels, 375 objects, 80 classes."""
    folder = tmp_path_factory.mktemp("hard")
    return write_page(folder / "out", material(folder, [(90, 120), (120, 8000), (400, 520)], [0, 60, 375]))


def test_what_is_hard_to_lay_out(hard):
    page = check_page(hard)
    text = " ".join(page.texts)
    assert CLASSES[0] in text and '<b>car</b> & "co"' not in hard.read_text() and "made <up>" in text
    assert "image 2 of #1 & 'others'.png" in text and "a warning" in text
    assert "Of 433 objects in the labels" in text
    assert len([file for file in page.files if file.endswith("_truth.jpg")]) == 2 * 2  # linked and shown
    assert "3 images, 1 without a change" in text


@pytest.mark.skipif(BROWSER is None, reason="no browser is at hand; what the page names is checked above")
def test_in_a_browser(hard):
    for width in (1280, 600):
        shown = browse(hard, width)
        assert shown["width"] <= shown["window"] and not shown["broken"] and shown["shown"] == "2 of 2 images"
    everything = shown["changes"]
    lost = browse(hard, 1280, "#kind=lost")["changes"]
    assert set(lost) == {"lost"} and len(lost) == everything.count("lost") > 0
    assert {"lost", "moved", "class changed"} <= set(everything)
    filtered = browse(hard, 1280, "#kind=&class=class+number+7")
    assert 0 < len(filtered["changes"]) < len(everything) / 10
    assert browse(hard, 1280, "#class=none+such")["changes"] == everything


def test_without_labels_and_without_changes(tmp_path):
    without = material(tmp_path, [(90, 120)], [12], labels=False)
    page = check_page(write_page(tmp_path / "out", without))
    assert "right before" not in " ".join(page.texts) and not any("truth" in file for file in page.files)
    identical = without._replace(recorders=(without.recorders[0],) * 2, tokens=lambda record: None)
    path = write_page(tmp_path / "out", identical)  # in the place of the other
    text = " ".join(Page(path).texts)
    assert "No image has a change." in text and [file.name for file in path.parent.iterdir()] == ["index.html"]
    none_shown = Page(write_page(tmp_path / "out", without._replace(images=0)))
    assert none_shown.files == ["tokens.jpg"] * 2 and "No image has a change." not in " ".join(none_shown.texts)


def test_masks_without_a_pixel_and_names_that_are_no_utf8(tmp_path):
    odd = material(tmp_path, [(90, 120)], [12])
    record, kept = odd.records[0], odd.recorders[1].outputs[0]
    kept["segm"][0] = rle.encode(np.zeros((90, 120), np.uint8, order="F"))
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    os.rename(record["file_name"], path)
    record["file_name"] = str(path)
    page = check_page(write_page(tmp_path / "out", odd))
    assert any(f"expedited: {len(kept['segm'])}" in text for text in page.texts)
    assert any("caf?.png" in text for text in page.texts)


def test_an_error_leaves_the_older_report(tmp_path):
    page_material = material(tmp_path, [(90, 120)], [12])
    path = write_page(tmp_path / "out", page_material)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def read(record):
        raise InputError("torn")

    with pytest.raises(InputError, match="torn"):
        write_page(tmp_path / "out", page_material._replace(read=read))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report"]


def test_a_folder_of_the_users_is_not_replaced(tmp_path):
    check_report(tmp_path)
    (tmp_path / "report").mkdir()
    check_report(tmp_path)
    (tmp_path / "report" / "index.html").write_text("my thesis")
    with pytest.raises(InputError, match="--report replaces .*, which is not a report"):
        check_report(tmp_path)
    (tmp_path / "report" / "index.html").write_text(f"<head>{MARK}")
    check_report(tmp_path)


@pytest.mark.parametrize(
    "size, expected",
    [((600, 800), (600, 800)), ((3000, 4000), (600, 800)), ((256, 128), (640, 320)), ((100, 8000), (20, 1600))],
)
def test_pictures_have_a_sensible_size(size, expected):
    assert scaled_size(size) == expected


def test_the_plot_has_what_is_kept():
    compared = comparison(3)
    document = to_json(compared, dataset="", device="cpu", dtype="float32", plan=Plan().describe())
    (curve,) = accuracy_and_time(document).values()
    assert [point.model for point in curve] == ["unmodified", "fast attention", "expedited"]
    unmodified, _, expedited = curve
    assert unmodified.figure == (40.0, (0.0, 0.0)) and expedited.figure.middle == 38.0 and expedited.time.middle == 8.0
    share = compared.retention("expedited")["segm.AP"]
    assert expedited.figure.ends == pytest.approx((max(0, 38 - 40 * share.low), max(0, 40 * share.high - 38)))
