"""`vtc run`."""

from __future__ import annotations

import argparse
from typing import Any

from vtc.cli.common import not_here, positions_given, print_json, progress_bar

_OF_ENCODERS = ("--flops", "--size")


_OF_LLMS = (
    "--prompt",
    "--where",
    "--pooled",
    "--positions",
    "--slots",
    "--max-new-tokens",
    "--dtype",
    "--device",
    "--trust-remote-code",
)


def run(args: argparse.Namespace) -> int:
    return _run_encoder(args) if args.model in (None, "dinov2-small") else _run_llm(args)


def _run_llm(args: argparse.Namespace) -> int:
    from vtc.bench.environment import environment
    from vtc.methods import budgeted, make
    from vtc.models.images import example_photo, load_image

    not_here(args, *_OF_ENCODERS, what="an encoder alone, without --model")
    given = {"preset": args.preset, "where": args.where, "pooled": args.pooled or None, **positions_given(args)}
    name = args.method or "idpruner"
    given["keep"] = args.tokens if args.tokens is not None else args.keep or (0.25 if budgeted(name) else None)
    method = make(name, **{key: value for key, value in given.items() if value is not None})
    if args.out is not None:
        from vtc.viz import check_target

        check_target(args.out)
    paths = args.image or [str(example_photo())]
    images = [load_image(path) for path in paths]
    prompt, repeats = args.prompt or "Describe this image.", args.repeats or 3

    from vtc.bench.answer import compare
    from vtc.models.llms import build_inputs, load

    more = {"dtype": args.dtype or "auto", "device": args.device or "cpu", "trust_remote_code": args.trust_remote_code}
    with progress_bar(args, 2 * (repeats + 2), "loading the model") as bar:
        processor, model = load(args.model, method, **more)
        inputs = build_inputs(processor, images, prompt)
        ready = model()
        bar.set_description("dense and compressed in turns")
        found = compare(ready, processor, inputs, method, args.max_new_tokens or 64, repeats, tick=bar.update)
    result = {"model": args.model, "images": paths, "prompt": prompt, **found.to_dict()}
    dtype = str(ready.dtype).removeprefix("torch.")
    result["environment"] = environment(batch=1, dtype=dtype, device=more["device"], repeats=repeats)
    if args.out is not None:
        from vtc.bench.answer import picture
        from vtc.viz import save

        save(picture(images[0], found), args.out)
        result["picture"] = args.out
    if not args.json:
        from vtc.cli.tables import show_chat

        show_chat(found, result)
    return print_json(args, result)


def _run_encoder(args: argparse.Namespace) -> int:
    from vtc.bench.environment import environment
    from vtc.errors import OptionError
    from vtc.methods import budgeted, make
    from vtc.models.images import example_photo, load_image, preprocess
    from vtc.viz import check_target, save

    not_here(args, *_OF_LLMS, what="a multimodal LLM: name one with --model")
    if len(args.image or []) > 1:
        raise OptionError(
            "--image was given more than once: an encoder takes one; a multimodal LLM is named by --model"
        )
    size, repeats = args.size or 224, args.repeats or 5
    options: dict[str, Any] = {"keep": args.tokens if args.keep is None else args.keep, "flops": args.flops}
    name = args.method or "pitome"
    if options == {"keep": None, "flops": None} and budgeted(name):
        options["flops"] = 0.5
    if args.preset is not None:
        options["preset"] = args.preset
    method = make(name, **{key: value for key, value in options.items() if value is not None})
    if args.keep is not None and args.keep < 0.5 and not method.one_shot:
        raise OptionError(f"--keep {args.keep:g}: every layer keeps at least half; give --tokens N or --flops F")
    if size % 14:
        near = max(14, 14 * round(size / 14))
        raise OptionError(f"--size {size}: the model's patches are 14 pixels wide, give a multiple such as {near}")
    out = check_target(args.out or "vtc-run.png")
    path = args.image[0] if args.image else str(example_photo())
    photo = load_image(path)
    pixels = preprocess(photo, size)
    with progress_bar(args, 2 * (repeats + 1), "loading the model") as bar:
        from PIL import ImageOps

        from vtc.bench.photo import compare, picture
        from vtc.checkpoints import dinov2_saliency

        model = dinov2_saliency()
        bar.set_description("dense and compressed in turns")
        found = compare(model, pixels, method, repeats, tick=bar.update)
    square = ImageOps.fit(photo, (min(photo.size),) * 2)
    save(picture(square, found, (size // 14,) * 2), out)
    about = {"image": path, "size": size, "model": "DINOv2 ViT-S/14 with a saliency decoder"}
    result = {**about, **found.to_dict(), "picture": str(out)}
    result["environment"] = environment(batch=1, dtype="float32", repeats=repeats)
    if not args.json:
        from vtc.cli.tables import show_run

        show_run(found, result)
    return print_json(args, result)
