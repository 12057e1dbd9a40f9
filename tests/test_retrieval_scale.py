"""demos/index_pages.py: a folder of pages into a table, by Ray's workers or without any, whatever ends one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ray", reason="ray is not installed (extra index); run make retrieval-check")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "demos" / "index_pages.py"
sys.path.insert(0, str(SCRIPT.parent))
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COUNT, BATCH, PART = 240, 2, 16


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """240 quarters of pages, 128 x 128 pixels, in two folders: 60 and 180."""
    from vtc.eval.pages import page

    folder = tmp_path_factory.mktemp("crops")
    for name in ("a", "b"):
        (folder / name).mkdir()
    for i in range(COUNT // 4):
        whole = page(i, (256, 256)).image
        for j, box in enumerate(((0, 0), (128, 0), (0, 128), (128, 128))):
            crop = whole.crop((*box, box[0] + 128, box[1] + 128))
            crop.save(folder / "ab"[j > 0] / f"{i:02}{j}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def whole(crops, tmp_path_factory):
    """The table of the crops, by one process."""
    out = tmp_path_factory.mktemp("whole") / "table"
    assert run(crops, out)["pages"] == COUNT
    return contents(out)


def run(folder, out, *options):
    from index_pages import main

    return main([str(folder), "--out", str(out), "--batch", str(BATCH), *options])


def start(folder, out, *options):
    command = [sys.executable, SCRIPT, folder, "--out", out, "--batch", BATCH, *options]
    log = open(out.with_suffix(".log"), "w")  # noqa: SIM115
    return subprocess.Popen([*map(str, command)], env={**os.environ, **QUIET}, stdout=log, stderr=log, cwd=out.parent)


def parts(out):
    return sorted(out.glob("part-*.parquet"))


def wait_for_parts(process, out, count):
    end = time.monotonic() + 120
    while len(parts(out)) < count:
        assert process.poll() is None and time.monotonic() < end, out.with_suffix(".log").read_text()
        time.sleep(0.02)


def contents(out):
    """Path -> tokens, vectors and reason; every path comes once."""
    rows = [row for part in parts(out) for row in pq.read_table(part).to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row.pop("path"): row for row in rows}


def same(got, want):
    assert got.keys() == want.keys()
    for path, row in want.items():
        assert {**got[path], "vectors": 0} == {**row, "vectors": 0}
        assert np.array_equal(got[path]["vectors"], row["vectors"])


def test_a_killed_worker_loses_no_page_and_doubles_none(crops, whole, tmp_path):
    import psutil

    out = tmp_path / "table"
    process = start(crops, out, "--workers", 2)
    wait_for_parts(process, out, 2)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in "".join(p.cmdline()[:1])
    ]
    os.kill(workers[0].pid, signal.SIGKILL)
    at_that_time = len(parts(out))
    assert process.wait(180) == 0, out.with_suffix(".log").read_text()
    assert len(workers) == 2 and at_that_time < COUNT // PART
    assert f"{COUNT} pages encoded, 0 failed" in out.with_suffix(".log").read_text()
    same(contents(out), whole)


def test_an_interrupted_run_does_the_rest(crops, whole, tmp_path):
    out = tmp_path / "table"
    process = start(crops / "a", out)
    wait_for_parts(process, out, 2)
    process.kill()
    process.wait()
    (out / "part-0.1.tmp").write_text("half a part")  # such as it may leave
    before = {part: part.stat().st_mtime_ns for part in parts(out)}
    rest = COUNT // 4 - PART * len(before)
    assert rest > 0
    assert run(crops / "a", out)["pages"] == rest
    assert all(part.stat().st_mtime_ns == at for part, at in before.items())
    same(contents(out), {path: row for path, row in whole.items() if Path(path).parent.name == "a"})
    assert run(crops / "a", out)["pages"] == 0
    assert not list(out.glob("*.tmp"))


def test_vectors_are_those_of_the_model(crops, whole):
    """Half of the 64 tokens and the two beside them, three times fewer, as `vtc.compress` and `pool` give them."""
    import vtc
    from vtc.checkpoints.tiny import tiny_colqwen

    path, row = next(iter(whole.items()))
    model, processor = tiny_colqwen()
    with vtc.compress(model, "divprune", keep=0.5), torch.no_grad():
        found = model(**processor.process_images([Image.open(path)])).embeddings
    want = vtc.retrieval.pool(found, 3)[0]
    assert row["tokens"] == 32 and want.shape == (11, 64)
    np.testing.assert_allclose(np.array(row["vectors"], dtype=np.float32), want.numpy(), atol=1e-3)


def test_pages_that_fail_are_rows_with_their_reason(crops, tmp_path):
    folder, out = tmp_path / "pages", tmp_path / "table"
    folder.mkdir()
    good = sorted(crops.rglob("*.png"))[:3]
    for i, path in enumerate(good):
        (folder / f"good{i}.png").write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes(good[0].read_bytes()[:300])
    (folder / "text.jpg").write_text("no picture")
    Image.new("RGB", (4000, 2)).save(folder / "thin.png")  # Qwen's processor refuses it, and with it its batch
    assert run(folder, out)["failed"] == 3
    rows = {Path(path).name: row for path, row in contents(out).items()}
    assert len(rows) == 6
    for name, words in {"cut.png": "truncated", "text.jpg": "cannot identify", "thin.png": "aspect ratio"}.items():
        assert words in rows[name]["error"] and rows[name]["vectors"] is None
    assert all(rows[f"good{i}.png"]["error"] is None and len(rows[f"good{i}.png"]["vectors"]) == 11 for i in range(3))

    # once more: those that failed, and one that has changed
    (folder / "text.jpg").write_bytes(good[2].read_bytes())
    (folder / "good0.png").write_bytes(good[1].read_bytes())
    os.utime(folder / "good0.png", ns=(1, 1))
    assert {**run(folder, out), "found": 0} == {"pages": 4, "failed": 2, "found": 0}
    new = {Path(path).name: row for path, row in contents(out).items()}
    assert len(new) == 6 and new["text.jpg"]["error"] is None
    assert new["good0.png"]["vectors"] == new["good1.png"]["vectors"] != rows["good0.png"]["vectors"]
    assert new["good2.png"] == rows["good2.png"]


def test_lancedb_finds_the_page(tmp_path):
    pytest.importorskip("lancedb")
    from vtc.eval.pages import page, queries

    folder, out = tmp_path / "pages", tmp_path / "table"
    folder.mkdir()
    drawn = [page(i, (256, 256)) for i in range(12)]
    for i, each in enumerate(drawn):
        each.image.save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    asked = queries(drawn, 6)
    found = [run(folder, out, "--query", query.text)["found"] for query in asked]
    right = [Path(rows[0]["path"]).stem == str(query.page) for rows, query in zip(found, asked, strict=True)]
    assert sum(right) >= 5
    assert all(len(rows) == 5 and rows[0]["_distance"] <= rows[1]["_distance"] for rows in found)


def test_photographs_by_open_clip(crops, tmp_path):
    """One vector each: that of the compressed model, of which the table says how many tokens stayed."""
    open_clip = pytest.importorskip("open_clip")
    import vtc

    side = {"image_size": 64, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
    words = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": side, "text_cfg": words}, "preprocess_cfg": {"size": 64}}
    folder, out = tmp_path / "model", tmp_path / "table"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    random = open_clip.CLIP(**config["model_cfg"])
    torch.save(random.state_dict(), folder / "open_clip_pytorch_model.bin")
    name = f"local-dir:{folder}"
    assert run(crops / "a", out, "--model", f"open_clip:{name}", "--keep", "0.75", "--workers", "0")["failed"] == 0
    model, _, prepare = open_clip.create_model_and_transforms(name)
    rows = contents(out)
    path = min(rows)
    with vtc.compress(model.eval(), "tome", keep=0.75) as handle, torch.no_grad():
        want = model.encode_image(prepare(Image.open(path))[None], normalize=True)
        assert rows[path]["tokens"] == handle.report.after[0] < 64
    assert {np.shape(row["vectors"]) for row in rows.values()} == {(1, 24)}
    np.testing.assert_allclose(np.array(rows[path]["vectors"], dtype=np.float32), want.numpy(), atol=1e-3)


WRONG = {
    "unknown method": (("--method", "divprun"), "did you mean"),
    "keep": (("--keep", "0"), "keep=0"),
    "factor": (("--factor", "0.5"), "factor=0.5"),
    "batch": (("--batch", "0"), "--batch 0"),
    "weights": (("--model", "open_clip:ViT-B-32"), "give --pretrained"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_out_of_range(case, crops, tmp_path, capsys):
    options, words = WRONG[case]
    with pytest.raises(SystemExit):
        run(crops, tmp_path / "table", *options)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_another_table_is_asked_for(crops, tmp_path, capsys):
    from index_pages import main

    (tmp_path / "settings.json").write_text(json.dumps({"model": "tiny_colqwen", "keep": 0.25}))
    with pytest.raises(SystemExit):
        run(crops, tmp_path)
    assert "keep=0.25, not 0.5: give another --out" in capsys.readouterr().err
    for name in ("none", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "page.png").write_text("no picture")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none"), "--out", str(tmp_path / "table")])
    assert "holds no file that ends in .jpg" in capsys.readouterr().err
    pytest.importorskip("lancedb")
    with pytest.raises(SystemExit, match="no page with vectors"):
        run(tmp_path / "broken", tmp_path / "table", "--query", "words")
