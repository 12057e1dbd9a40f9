"""Encode and pool a folder of pages or photographs into a table that LanceDB or Qdrant reads.

    python demos/index_pages.py scans --out table --query "words of a page"    # vtc's own tiny retriever, no network
    python demos/index_pages.py scans --out table --model vidore/colqwen2-v1.0-hf --workers 8 --gpus 1 --address auto
    python demos/index_pages.py photos --out table --model open_clip:ViT-B-32 --pretrained laion2b_s34b_b79k

The table is a folder of Parquet files, one for every eight batches. A part appears whole, under a name that its pages
make: whatever ends a worker or the run, nothing is lost and nothing comes twice. The same line again encodes what is
not in the table, what failed and what has changed. One run at a time; a cluster needs both folders on every machine.
A row: path; modified, the file's time; key, of its bytes, an id; tokens that stayed in the model; vectors, float16 and
of length 1, a photograph has one; error, why there are none, or null. For LanceDB see `search`. Qdrant:

    how = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    client.create_collection("pages", models.VectorParams(size=64, distance="Cosine", multivector_config=how))
    for part in pages("table").to_batches():
        ids, vectors, paths = (part[name].to_pylist() for name in ("key", "vectors", "path"))
        client.upsert("pages", models.Batch(ids=ids, vectors=vectors, payloads=[{"path": path} for path in paths]))
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import vtc
from vtc.checkpoints import tiny

_logger = logging.getLogger("index_pages")


class Retriever:
    """ColPali or ColQwen2: a vector for every token that stays in the model, then fewer of them."""

    def __init__(self, model: str, factor: float, **unused: Any) -> None:
        from transformers import AutoModelForPreTraining, AutoProcessor

        kinds: Any = (AutoModelForPreTraining, AutoProcessor)
        found: Any = tiny.tiny_colqwen() if model == "tiny_colqwen" else [kind.from_pretrained(model) for kind in kinds]
        (self.model, self.processor), self.factor = found, factor

    def pages(self, images: list[Image.Image]) -> list[Tensor]:
        found = self._run(self.processor.process_images(images))
        return vtc.retrieval.pool([page[page.abs().sum(-1) > 0] for page in found], self.factor)  # zeros are padding

    def query(self, words: str) -> Tensor:
        return self._run(self.processor.process_queries([words]))[0]

    def _run(self, inputs: Any) -> Tensor:
        return self.model(**inputs.to(self.model.device)).embeddings.float()


class OpenCLIP:
    """One vector for a photograph."""

    def __init__(self, model: str, pretrained: str | None, **unused: Any) -> None:
        import open_clip

        name = model.removeprefix("open_clip:")
        self.model, _, self.prepare = open_clip.create_model_and_transforms(name, pretrained)
        self.tokenizer = open_clip.get_tokenizer(name)

    def pages(self, images: list[Image.Image]) -> list[Tensor]:
        pixels = torch.stack([self.prepare(image) for image in images]).to(self.model.logit_scale)
        return list(self.model.encode_image(pixels, normalize=True)[:, None])

    def query(self, words: str) -> Tensor:
        return self.model.encode_text(self.tokenizer([words]).to(self.model.logit_scale.device), normalize=True)


def encoder(settings: dict[str, Any]) -> Retriever | OpenCLIP:
    made = (OpenCLIP if settings["model"].startswith("open_clip:") else Retriever)(**settings)
    made.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return made


class Indexer:
    """A worker: it holds the compressed model, and turns files into a part of the table."""

    @torch.no_grad()
    def __init__(self, settings: dict[str, Any], out: Path, batch: int) -> None:
        self.encoder, self.out, self.batch = encoder(settings), out, batch
        vectors = pa.list_(pa.list_(pa.float16(), self.encoder.query("a").shape[1]))
        kinds = {"path": pa.string(), "modified": pa.int64(), "key": pa.string(), "tokens": pa.int32()}
        self.schema = pa.schema({**kinds, "vectors": vectors, "error": pa.string()})
        self.handle = vtc.compress(self.encoder.model, settings["method"], keep=settings["keep"])

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """block: {"paths": [paths]}, since this is what Ray hands over; it takes what happened in the same manner."""
        paths, rows = [str(path) for path in block["paths"][0]], []
        for start in range(0, len(paths), self.batch):
            opened = [read(path) for path in paths[start : start + self.batch]]
            self.encode([(row, image) for row, image in opened if image])
            rows += [row for row, _ in opened]
        name = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:24]
        write(pa.Table.from_pylist(rows, self.schema), self.out / f"part-{name}.parquet")
        failed = [f"{row['path']}: {row['error']}" for row in rows if "error" in row]
        return {"pages": [len(paths)], "failed": [len(failed)], "first": ["".join(failed[:1])]}

    @torch.no_grad()
    def encode(self, pages: list[tuple[dict[str, Any], Any]]) -> None:
        if not pages:
            return
        try:
            found = self.encoder.pages([image for _, image in pages])
        except Exception as error:  # of whichever page: alone, it has its reason
            for row, image in pages:
                self.encode([(row, image)]) if len(pages) > 1 else row.update(error=f"{type(error).__name__}: {error}")
        else:
            for (row, _), vectors, tokens in zip(pages, found, self.handle.report.after, strict=True):
                row.update(vectors=list(vectors.half().cpu().numpy()), tokens=tokens)


def read(path: str) -> tuple[dict[str, Any], Image.Image | None]:
    """A page's row without vectors, and its picture; None = the row has the reason."""
    row: dict[str, Any] = {"path": path, "modified": 0}
    try:
        row["modified"] = os.stat(path).st_mtime_ns
        row["key"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
        return row, ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        return row | {"error": f"{type(error).__name__}: {error}"}, None


def write(table: pa.Table, path: Path) -> None:
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    pq.write_table(table, unfinished)
    unfinished.replace(path)


def remaining(files: dict[str, int], out: Path) -> list[str]:
    """The files (with their times) without a row. Rows that failed, or whose file has changed, leave the table."""
    left = dict(files)
    for unfinished in out.glob("part-*.tmp"):
        unfinished.unlink()
    for part in out.glob("part-*.parquet"):
        rows = pq.read_table(part, columns=["path", "modified", "error"]).to_pylist()
        stay = [files.get(r["path"]) in (None, r["modified"]) and not (r["error"] and r["path"] in files) for r in rows]
        if not all(stay):
            write(pq.read_table(part).filter(pa.array(stay)), part) if any(stay) else part.unlink()
        for row in itertools.compress(rows, stay):
            left.pop(row["path"], None)
    return list(left)


def index(paths: list[str], settings: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What happened, part by part, as they come."""
    size, given = 8 * args.batch, (settings, args.out.resolve(), args.batch)
    blocks = [{"paths": paths[start : start + size]} for start in range(0, len(paths), size)]
    if not args.workers:
        indexer = Indexer(*given)
        yield from ({name: value[0] for name, value in indexer({"paths": [b["paths"]]}).items()} for b in blocks)
        return
    import ray

    here = {} if args.address else {"num_cpus": max(args.workers + 1, os.cpu_count() or 1), "include_dashboard": False}
    ray.init(args.address or "local", log_to_driver=False, logging_level="WARNING", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the one of `main` counts pages
    # Ray gives the part of a worker that dies to another. An error that is no page's, such as a full disk, ends the
    # run (max_errored_blocks is 0), and the parts that are written stay
    found = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        Indexer,
        fn_constructor_args=given,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_gpus=args.gpus or None,
    )
    yield from found.iter_rows()
    ray.shutdown()


def pages(out: str | Path) -> ds.Dataset:
    """The table's pages that have vectors."""
    return ds.dataset(sorted(map(str, Path(out).glob("part-*.parquet")))).filter(ds.field("error").is_null())


def search(out: Path, words: str, top: int = 5) -> list[dict[str, Any]]:
    """The pages nearest to the words, by LanceDB, which reads the table first."""
    import lancedb

    found = pages(out)
    if not found.count_rows():
        raise SystemExit(f"{out} has no page with vectors; its column error says why")
    parts = (part for part in found.to_batches() if part.num_rows)  # LanceDB cannot begin with a part without pages
    reader = pa.RecordBatchReader.from_batches(found.schema, parts)
    table = lancedb.connect(out / "lance").create_table("pages", reader, mode="overwrite")
    with torch.no_grad():
        asked = encoder(json.loads((out / "settings.json").read_text())).query(words).cpu().numpy()
    nearest = table.search(asked, vector_column_name="vectors").distance_type("cosine")
    return nearest.select(["path", "_distance"]).limit(top).to_list()


def begin(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int]]:
    """The table's settings, and the files with their times; what cannot be done is said before anything is."""
    clip = args.model.startswith("open_clip:")
    settings = {"model": args.model, "pretrained": args.pretrained, "factor": args.factor}
    settings["method"] = args.method or ("tome" if clip else "divprune")
    settings["keep"] = (0.95 if clip else 0.5) if args.keep is None else args.keep
    vtc.methods.make(settings["method"], keep=settings["keep"])
    vtc.retrieval.pool([torch.eye(2)], args.factor)
    if args.batch < 1 or args.workers < 0:
        raise ValueError(f"--batch {args.batch} --workers {args.workers}: pages at a time from 1 on, workers from 0 on")
    if clip and not args.pretrained and args.model.count(":") < 2:
        raise ValueError(f"{args.model} alone has random weights: give --pretrained, which takes a name or a file")
    suffixes = (".jpg", ".jpeg", ".png")
    files = [path for path in sorted(args.folder.resolve().rglob("*")) if path.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"{args.folder} holds no file that ends in {', '.join(suffixes)}")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "settings.json"
    for name, other in json.loads(kept.read_text()).items() if kept.exists() else ():
        if settings[name] != other:
            raise ValueError(f"{args.out} is a table with {name}={other}, not {settings[name]}: give another --out")
    kept.write_text(json.dumps(settings))
    return settings, {str(path): path.stat().st_mtime_ns for path in files}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="jpg and png files, also in folders inside")
    add("--out", type=Path, required=True, help="the table's folder")
    add("--model", default="tiny_colqwen", help="tiny_colqwen, a ColPali or ColQwen2 of transformers, open_clip:NAME")
    add("--pretrained", help="open_clip's name of the weights, or their file")
    add("--method", help="of vtc (default: divprune, or tome for open_clip)")
    add("--keep", type=float, help="what stays of the image tokens (default: 0.5, or 0.95 a layer for open_clip)")
    add("--factor", type=float, default=3.0, help="how many times fewer vectors a page; 1 = all")
    add("--workers", type=int, default=0, help="Ray's; 0 = in this process, without Ray")
    add("--gpus", type=float, default=0, help="of each worker")
    add("--address", help="of a Ray cluster (default: one on this machine, for this run)")
    add("--batch", type=int, default=4, help="pages that the model takes together")
    add("--query", metavar="WORDS", help="the pages nearest to these, by LanceDB")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings, files = begin(args)
    except (ValueError, OSError, vtc.errors.VTCError) as error:
        parser.error(str(error))
    left, result = remaining(files, args.out), {"pages": 0, "failed": 0}
    with tqdm(total=len(files), initial=len(files) - len(left), unit="page", desc="index") as bar:
        for part in index(left, settings, args) if left else ():
            bar.update(part["pages"])
            result = {name: value + int(part[name]) for name, value in result.items()}
            if part["failed"]:
                bar.write(f"{part['failed']} failed: {part['first']}")
    _logger.info("%(pages)d pages encoded, %(failed)d failed", result)
    found = search(args.out, args.query) if args.query else []
    for row in found:
        _logger.info("%.4f  %s", row["_distance"], row["path"])
    return {**result, "found": found}


if __name__ == "__main__":
    main()
