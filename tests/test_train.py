"""Training IDPruner's scorer: what it learns, that the model stays as it was, and that breaks do not matter."""

import copy
import json

import mllm_processor
import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_deepstack, dense_features, oracle
from torch.nn.functional import cross_entropy

import vtc
from vtc.adapters.multimodal.find import find as find_llms
from vtc.scores import Scorer, diff_top_k, load_scorer, save_scorer
from vtc.train import train_scorer
from vtc.train.__main__ import main
from vtc.train.data import Examples
from vtc.train.selection import SELECTIONS, Selection, selecting

CASES = [(name, case) for name in zoo.FAMILIES for case in ("pair", "ragged_right", "video") if case in zoo.CASES[name]]
CASES.remove(("gemma3_sliding", "ragged_right"))  # there the plain model is not in a batch what it is alone


def batch(name, case="single", seed=0):
    inputs = zoo.inputs(name, case, seed)
    hidden = zoo.placeholders(zoo.build(name), inputs["input_ids"]) | (inputs["attention_mask"] == 0)
    return inputs | {"labels": inputs["input_ids"].masked_fill(hidden, -100)}


def quick(model, batches, **options):
    return train_scorer(model, batches, **({"steps": 3, "lr": 1e-2, "progress": False} | options))


def weights(scorer):
    return torch.cat([p.flatten() for p in scorer.parameters()])


# -- what it learns -------------------------------------------------------------------------------------------------

CLASSES, PLANTED = 4, 2


def puzzles(count, generator):
    """Images of noise, but for two patches that show one of four stamps; the answer is which."""
    stamps = 1.5 * torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    answer = torch.randint(CLASSES, (count,), generator=generator)
    patches = torch.randn(count, 25, 3, 8, 8, generator=generator)
    places = torch.stack([torch.randperm(25, generator=generator)[:PLANTED] for _ in range(count)])
    patches[torch.arange(count)[:, None], places] = stamps[answer][:, None]
    pixels = patches.view(count, 5, 5, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 40, 40)
    ids = torch.tensor([[1, 7, *[zoo.IMAGE] * 25, 8, 9, 0]]).repeat(count, 1)
    ids[:, -1] = 50 + answer
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}
    return found, places, answer


@pytest.fixture(scope="module")
def reader():
    """A tiny LLaVA whose decoder has learned to read the stamps, wherever they are; and puzzles."""
    model, generator = zoo.build("llava", fresh=True), torch.Generator().manual_seed(2)
    parts = [model.model.language_model, model.model.multi_modal_projector, model.lm_head]
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=3e-3)
    for _ in range(130):
        optimizer.zero_grad()
        model(**puzzles(16, generator)[0]).loss.backward()
        optimizer.step()
    model.zero_grad()
    return model, [puzzles(8, generator)[0] for _ in range(30)], puzzles(200, generator)


def rank(model, scorer, test):
    """How many tokens the scorer puts before a planted one: on average 0.5 at best, 12 by chance."""
    inputs, places, _ = test
    with torch.no_grad():
        rows = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        scores = scorer.score(torch.stack(list(rows)))
    return (scores[:, None] > scores.gather(1, places)[..., None]).sum(-1).float().mean().item()


def accuracy(model, test):
    inputs = {k: v for k, v in test[0].items() if k != "labels"}
    with torch.no_grad():
        return (model(**inputs).logits[:, -2].argmax(-1) == 50 + test[2]).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
def test_it_finds_the_tokens_that_matter(reader, tmp_path, selection):
    model, batches, test = reader
    assert accuracy(model, test) > 0.97
    start = Scorer(64, 32)  # one that is wrong: it looks the other way
    start.load_state_dict(quick(model, batches, steps=60, lr=1e-3, keep=0.2, seed=1).state_dict())
    with torch.no_grad():
        start.key.weight.neg_(), start.key.bias.neg_()
    assert rank(model, start, test) > 12
    chosen = quick(model, batches, steps=120, lr=2e-3, keep=0.2, scorer=start, selection=selection)
    assert rank(model, chosen, test) < 1
    found = {}
    for name, scorer in (("start", start), ("chosen", chosen)):
        path = str(tmp_path / f"{name}.safetensors")
        save_scorer(scorer, path)
        with vtc.compress(model, "idpruner", keep=3, balance=1.0, scorer=path) as handle:
            found[name] = accuracy(model, test)
            assert set(handle.report.after) == {3} and handle.report.notes == "importance: scorer"
            with torch.no_grad():
                rows = model.model.get_image_features(test[0]["pixel_values"], return_dict=True).pooler_output
            top = scorer.score(torch.stack(list(rows))).topk(3).indices
            assert torch.equal(handle.token_map.anchor, top.sort(1).values)
    assert found["chosen"] > 0.9 and found["start"] < 0.6


@pytest.mark.slow
def test_from_several_seeds(reader):
    model, batches, test = reader
    for seed in range(3):
        assert rank(model, quick(model, batches, steps=80, lr=2e-3, seed=seed), test) < 1.5


# -- what is weighed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_weights_are_put_in_where_the_adapter_divides(name, case, fill):
    """The loss is that of the plain decoder on rows weighed by hand, image by image, crop by crop, frame by frame."""
    model, given = zoo.build(name), batch(name, case)
    scorer = Scorer(64, 8)
    with torch.no_grad():
        for p in scorer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    inputs = {k: v for k, v in given.items() if k != "labels"}
    with vtc.compress(model, "random", keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        record = handle.patches[0].record
    visual = zoo.placeholders(model, inputs["input_ids"])
    number = (visual.flatten().long().cumsum(0) - 1).view(visual.shape)
    rows, planes = dense_features(model, inputs), dense_deepstack(model, inputs)
    scale = 1.0  # old versions of PaliGemma scale the tokens after their encoder
    if name == "paligemma":
        own = model.model.get_image_features(inputs["pixel_values"]).pooler_output.detach()
        scale = float((own.reshape(rows.shape) / rows).median())
    new = [x.clone() for x in (rows, *planes)]
    for prompt, places, count in zip(record.rows, record.places, record.lengths, strict=True):
        at = number[prompt, places[:count]]
        w = diff_top_k(scorer.score(rows[at][None] * scale).detach(), 0.3)[0, :, None]
        for x in new:
            x[at] = w * x[at] + ((1 - w) * x[at].mean(0) if fill == "mean" else 0)
    dense = oracle(name, model, inputs, replaced={"embeds": new[0], "deepstack": new[1:]}, steps=1)
    real = inputs["attention_mask"].bool()
    logits = torch.cat([x[:-1] for x in dense.prefill])
    labels = torch.cat([x[r][1:] for x, r in zip(given["labels"], real, strict=True)])
    losses = []
    options = {"steps": 1, "keep": 0.3, "anneal": 0, "fill": fill, "scorer": scorer}
    quick(model, [given], **options, on_step=lambda _, loss: losses.append(loss))
    assert losses[0] == pytest.approx(cross_entropy(logits, labels).item(), abs=2e-5)


@pytest.mark.parametrize(("name", "case"), [case for case in CASES if case[0] != "gemma3_sliding"])
def test_hard_selection_is_what_compressing_does(name, case, tmp_path):
    """The loss is that of the compressed model, which sees the tokens of the highest scores alone. (A window that is
    shorter than the prompt reaches further in the compressed model.)"""
    model, given = zoo.build(name), batch(name, case)
    visual = zoo.placeholders(model, given["input_ids"])
    given["labels"][:, 1:][visual[:, :-1]] = -100  # said by an image's last token, which may be hidden
    scorer = Scorer(64, 8)
    with torch.no_grad():
        for p in scorer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    path = str(tmp_path / "scorer.safetensors")
    save_scorer(scorer, path)
    with torch.no_grad(), vtc.compress(model, "idpruner", keep=0.3, balance=1.0, scorer=path):
        wanted = model(**given).loss.item()
    losses = []
    options = {"steps": 1, "keep": 0.3, "anneal": 0, "selection": "hard", "scorer": scorer}
    quick(model, [given], **options, on_step=lambda _, loss: losses.append(loss))
    assert losses[0] == pytest.approx(wanted, abs=5e-4)


def test_hidden_tokens_have_a_say():
    """The gradient of every token's weight, of those that are not seen too, is what a little more of it changes."""
    model, given = zoo.build("llava"), batch("llava")
    site = next(iter(find_llms(model)))
    chosen = Selection(site, Scorer(64, 8), "hard", "mean")
    columns = zoo.placeholders(model, given["input_ids"]).flatten()
    weight = (torch.arange(int(columns.sum())) % 3 == 0).float()

    def loss(weight):
        chosen.encode = lambda encode, args, kwargs: (
            chosen.weights.update(image=weight),
            setattr(chosen, "seen", True),
            encode.original(*args, **kwargs),
        )[-1]
        return chosen.loss(model, given)

    with selecting(model, chosen):
        weight.requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(weight), weight)
        for token in (0, 1, 2, 3):
            more = weight.detach().clone()
            more[token] += 1e-2
            change = float((loss(more) - loss(weight)).detach())
            assert change == pytest.approx(1e-2 * float(slope[token]), rel=0.2, abs=2e-6)
    assert bool((slope != 0).all())


def test_hard_selection_needs_attention_that_takes_a_mask():
    model = zoo.build("llava", fresh=True)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtc.UnsupportedModelError, match="sdpa"):
        quick(model, [batch("llava")], selection="hard")
    given = batch("llava")
    with pytest.raises(vtc.InputError, match="input_ids"):
        quick(zoo.build("llava"), [{"inputs_embeds": None, "pixel_values": given["pixel_values"]}], selection="hard")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_only_the_scorer_changes(name, selection):
    model = zoo.build(name)
    batches = [batch(name, "single"), batch(name, "pair", 1)]
    with torch.no_grad():
        model(**batches[0])  # old versions note something in the tower the first time
    before, state = zoo.fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    made = quick(model, batches, selection=selection)
    assert zoo.fingerprint(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    start = quick(model, batches, selection=selection, steps=1, lr=1e-12)
    assert (made.width, made.hidden, made.training) == (64, 32, False)
    for (key, a), b in zip(made.named_parameters(), start.parameters(), strict=True):
        assert not a.requires_grad and bool(a.isfinite().all())
        assert key == "key.bias" or not torch.equal(a, b), key


def test_the_budget_shrinks(monkeypatch):
    budgets = []

    def note(w, keep, mask):
        budgets.append(keep)
        return diff_top_k(w, keep, mask)

    monkeypatch.setattr("vtc.train.selection.diff_top_k", note)
    quick(zoo.build("llava"), [batch("llava")], steps=8, keep=0.2, anneal=0.5)
    assert budgets == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])


def test_half_precision_and_checkpointed_layers():
    model = zoo.build("llava", fresh=True).to(torch.bfloat16).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    given = batch("llava")
    given["pixel_values"] = given["pixel_values"].bfloat16()
    made = quick(model, [given])
    assert made.query.weight.dtype == torch.float32 and bool(weights(made).isfinite().all())
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
def test_hooks_of_accelerate(how):
    accelerate = pytest.importorskip("accelerate")
    model, given = zoo.build("llava", fresh=True), [batch("llava")]
    want = quick(model, given)
    if how == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(weights(quick(model, given)), weights(want))


# -- runs and breaks ------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_nothing_is_left_after_an_exception(name):
    model, before = zoo.build(name), zoo.fingerprint(zoo.build(name))

    def stop(step, loss):
        raise Stop

    model.lm_head.weight.requires_grad_(False)
    try:
        with pytest.raises(Stop):
            quick(model, [batch(name)], on_step=stop)
        hook = zoo.text_model(model).layers[1].register_forward_hook(lambda *_: stop(0, 0))
        with pytest.raises(Stop):
            quick(model, [batch(name)])
        hook.remove()
        assert not model.lm_head.weight.requires_grad and next(model.parameters()).requires_grad
    finally:
        model.lm_head.weight.requires_grad_(True)
    assert zoo.fingerprint(model) == before


def test_the_same_seed_gives_the_same_weights():
    model, batches = zoo.build("llava"), [batch("llava", seed=seed) for seed in range(3)]
    before = torch.get_rng_state()
    first, second, other = (weights(quick(model, batches, steps=5, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["list", "iterable"])
def test_a_break_does_not_matter(how, tmp_path):
    model, path = zoo.build("qwen2_5_vl"), tmp_path / "run.safetensors"
    batches = [batch("qwen2_5_vl", seed=seed) for seed in range(5)]
    if how == "iterable":
        batches = {str(i): x for i, x in enumerate(batches)}.values()
    options = {"steps": 9, "accumulate": 2, "save_every": 2, "checkpoint": path, "seed": 3}
    whole = quick(model, batches, **{**options, "checkpoint": None})

    def stop(step, loss):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        quick(model, batches, **options, on_step=stop)
    steps = []
    resumed = quick(model, batches, **options, on_step=lambda step, _: steps.append(step))
    assert steps == [5, 6, 7, 8, 9]  # the last checkpoint held 4
    assert torch.equal(weights(resumed), weights(whole))
    again = quick(model, batches, **options, on_step=lambda step, _: steps.append(step))
    assert len(steps) == 5 and torch.equal(weights(again), weights(whole))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(vtc.OptionError, match="lr=0.01"):
        quick(model, batches, **{**options, "lr": 0.1})


def test_files_that_are_no_checkpoint(tmp_path):
    model, given = zoo.build("llava"), [batch("llava")]
    torch.save({"query.weight": torch.zeros(2)}, tmp_path / "pickle")
    save_scorer(Scorer(64, 32), tmp_path / "scorer")
    for name, match in (("pickle", "no safetensors"), ("scorer", "no checkpoint"), ("no/where", "no such folder")):
        with pytest.raises(vtc.OptionError, match=match):
            quick(model, given, checkpoint=tmp_path / name)


def test_going_on_from_a_scorer():
    model, given = zoo.build("llava"), [batch("llava")]
    start = Scorer(64, 16, "mine").requires_grad_(False)
    before = copy.deepcopy(start)
    made = quick(model, given, scorer=start)
    assert made.hidden == 16 and made.model == "mine" and not torch.equal(weights(made), weights(start))
    assert torch.equal(weights(start), weights(before))
    with pytest.raises(vtc.OptionError, match="64 wide, hidden 8"):
        quick(model, given, scorer=start, hidden=8)
    with pytest.raises(vtc.OptionError, match="32 wide"):
        quick(model, given, scorer=Scorer(32, 16))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 20}, "keep=20"),
        ({"steps": 0}, "steps=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"anneal": 1.5}, "anneal=1.5"),
        ({"fill": "noise"}, "fill='noise'"),
        ({"accumulate": True}, "accumulate=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, match):
    with pytest.raises(vtc.OptionError, match=match):
        quick(zoo.build("llava"), [batch("llava")], **options)


def test_bad_batches():
    model, given = zoo.build("llava"), batch("llava")
    before = zoo.fingerprint(model)
    for batches, match in (
        ([{k: v for k, v in given.items() if k != "labels"}], "no labels; it holds input_ids"),
        ([batch("llava", "text")], "no images"),
        ([], "came to an end"),
        (iter([given]), "came to an end"),
        ([list(given)], "a batch is a list"),
        ([given | {"pixel_values": given["pixel_values"] * float("nan")}], "step 1: the loss is nan"),
    ):
        with pytest.raises(vtc.InputError, match=match):
            quick(model, batches)
    with pytest.raises(vtc.OptionError, match="batches is a dict"):
        quick(model, given)
    assert zoo.fingerprint(model) == before


def test_bad_models():
    with pytest.raises(vtc.UnsupportedModelError, match="no multimodal LLM"):
        quick(torch.nn.Linear(2, 2), [])
    model = zoo.build("llava")
    with vtc.compress(model, "random", keep=0.4), pytest.raises(vtc.UnsupportedModelError, match="vtc.remove"):
        quick(model, [batch("llava")])


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    for name in mllm_processor.PROCESSORS:
        mllm_processor.save(name, root / name)
    for number in range(2):
        mllm_processor.picture(number).save(root / f"{number}.png")
    rows = [{"image": "0.png", "prompt": "what is this ?", "answer": "w5 w6"}]
    rows.append({"image": ["0.png", "1.png"], "prompt": "what ?", "answer": "w7"})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return root


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_command(folder, tmp_path, capsys, name):
    out, run = tmp_path / "scorer.safetensors", tmp_path / "run.safetensors"
    words = ["--model", folder / name, "--data", folder / "data.jsonl", "--out", out, "--keep", 0.4, "--lr", 0.01]
    words += ["--steps", 3, "--accumulate", 2, "--checkpoint", run, "--save-every", 2, "--hidden", 8]
    assert main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 steps, loss ") and str(out) in said and said.count("\n") == 1
    made = load_scorer(out)
    assert (made.width, made.hidden) == (64, 8) and name in made.model
    half = [*map(str, words[:6]), "--steps", "1", "--accumulate", "2", "--dtype", "bfloat16"]
    assert main(half) == 0 and load_scorer(out).hidden == 32
    assert capsys.readouterr().out.startswith("1 step, loss ")
    assert main(list(map(str, words))) == 0  # it is all done
    assert capsys.readouterr().out.startswith("0 steps, written")
    assert torch.equal(weights(load_scorer(out)), weights(made))
    with vtc.compress(zoo.build(name), "idpruner", keep=0.3, scorer=str(out)), torch.no_grad():
        zoo.build(name)(**zoo.inputs(name, "single"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_labels_are_the_answer_alone(folder, name):
    data = Examples(folder / "data.jsonl", 0)
    data.processor = mllm_processor.PROCESSORS[name]()
    one = next(data[i] for i in range(2) if len(data.rows[i][0]) == 1)
    ids, labels = one["input_ids"][0], one["labels"][0]
    text = data.processor.tokenizer.convert_ids_to_tokens(labels[labels >= 0].tolist())
    assert text == ["w5", "w6", "</s>"]
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])
    assert data.processor.tokenizer.convert_ids_to_tokens(ids[labels < 0].tolist())[-1] == "bot"
    assert all(x.shape == one["input_ids"].shape for k, x in one.items() if k.endswith(("ids", "mask", "labels")))
    data.processor.chat_template = None
    bare = next(data[i] for i in range(2) if len(data.rows[i][0]) == 1)["labels"][0]
    assert torch.equal(bare[bare >= 0], labels[labels >= 0])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "data.jsonl:2: no JSON"),
        ("[1]", '"image"'),
        ('{"prompt": "a", "answer": "b"}', '"image"'),
        ('{"image": [], "prompt": "a", "answer": "b"}', '"image"'),
        ('{"image": "0.png", "prompt": "a"}', '"answer"'),
        ('{"image": "9.png", "prompt": "a", "answer": "b"}', "9.png: no such file"),
    ],
)
def test_command_bad_data(folder, tmp_path, capsys, line, match):
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "data.jsonl").write_text('{"image": "0.png", "prompt": "a", "answer": "b"}\n' + line)
    words = ["--model", str(folder / "llava"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "x")]
    assert main(words) == 2
    done = capsys.readouterr()
    assert match in done.err and done.err.count("\n") == 1 and done.out == ""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--data", "no.jsonl"], "no.jsonl: No such file"),
        (["--data", "empty.jsonl"], "empty"),
        (["--data", "0.png"], "UTF-8"),
        (["--out", "no/where"], "no such folder"),
        (["--checkpoint", "0.png"], "no safetensors"),
        (["--model", "nowhere"], "nowhere"),
        (["--keep", "2"], "--keep"),
        (["--lr", "-1"], "lr=-1"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_command_bad_arguments(folder, monkeypatch, capsys, words, match):
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("\n")
    usual = ["--model", "llava", "--data", "data.jsonl", "--out", "out.safetensors", "--steps", "1"]
    assert main([*usual, *words]) == 2
    done = capsys.readouterr()
    assert match in done.err and done.err.count("\n") == 1 and done.out == ""
