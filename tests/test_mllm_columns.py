"""Columns that a caller counts, from the end or in labels: they are the caller's, whatever went."""

import copy

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_generate_positions, oracle

import vtc

NAMES = list(zoo.FAMILIES)
SOME = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3", "paligemma"]
LATER = 6  # columns of the longest completion


def completed(name, lengths=(LATER, 2, 4)):
    """Prompts padded on the left with completions padded on the right, as trainers of policies give them."""
    inputs = zoo.inputs(name, "ragged")
    ids = torch.randint(*zoo.TEXT_IDS, (3, LATER), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(LATER) < torch.tensor(lengths)[:, None]).long()
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids * mask], dim=1)}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in out:
            out[types] = torch.cat([out[types], torch.zeros_like(ids)], dim=1)
    return out


def positions(name, model, call):
    """[B, L] or [3, B, L] of the whole rows, each counted on from its prompt's."""
    before = dense_generate_positions(name, model, zoo.inputs(name, "ragged"))
    further = before[..., -1:] + 1 + torch.arange(LATER)
    return torch.cat([before, further.expand(*before.shape[:-1], LATER)], dim=-1)


def log_p(logits, call):
    """[B, LATER], of the completions, from logits of the last LATER + 1 columns."""
    targets = call["input_ids"][:, -LATER:]
    return logits[:, -LATER - 1 : -1].log_softmax(-1).gather(2, targets[..., None])[..., 0]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "divprune") for name in NAMES]
    + [(name, method) for name in ("llava", "qwen3_vl") for method in ("tome", "fastv", "cascade")],
)
@torch.no_grad()
def test_the_last_columns_are_the_callers(name, method):
    """One row's trailing padding does not move the others: log-probabilities of completions, by slicing the logits
    and by logits_to_keep, are those of each row alone."""
    options = {"keep": 0.4}
    if method == "fastv":
        options["layer"] = 2
    elif method == "cascade":
        options |= {"cascade": {2: 0.5}, "keep": 0.6}
    model, call = zoo.build(name), completed(name)
    places = positions(name, model, call)
    mask = call["attention_mask"].bool()[:, -LATER:]
    with vtc.compress(model, "dpc_knn" if method == "cascade" else method, **options) as handle:
        whole = model(**call, position_ids=places, use_cache=False).logits
        got = log_p(whole, call)
        last = model(**call, position_ids=places, logits_to_keep=LATER + 1, use_cache=False).logits
        assert last.shape[1] == LATER + 1 and torch.allclose(log_p(last, call), got, atol=1e-6)
        assert whole.shape[1] < call["input_ids"].shape[1]
        kept = handle.kept
        if name == "gemma3_sliding":  # whose windows the padding is in
            return
        for row in range(3):
            single = zoo.alone(name, "ragged", row)
            real = call["attention_mask"][row].bool()
            alone = {key: call[key][row : row + 1, real] for key in call if call[key].shape[:2] == kept.shape}
            single |= alone
            want = model(**single, position_ids=places[..., row : row + 1, :][..., real], use_cache=False).logits[0]
            assert torch.equal(handle.kept[0], kept[row, real])
            ids = alone["input_ids"][0]
            count = int(mask[row].sum())
            want = want[-count - 1 : -1].log_softmax(-1).gather(1, ids[-count:, None])[:, 0]
            assert torch.allclose(got[row, :count], want, atol=1e-5), f"row {row}"


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_logits_to_keep(name):
    """A number, and every tensor that the model takes: the caller's columns, mapped."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    length = inputs["input_ids"].shape[1]
    visual = zoo.placeholders(model, inputs["input_ids"])
    with vtc.compress(model, "random", keep=0.4) as handle:
        whole = model(**inputs, use_cache=False).logits
        record = handle.patches[0].record
        text = torch.tensor([length - 1, length - 3])
        every = text.repeat(3, 1)
        every[1, 1] = length - 2
        only = torch.zeros_like(visual)
        only[:, -2:] = True

        def at(columns):
            rows = record.at(columns.expand(3, -1))
            assert torch.equal(record.columns.gather(1, rows), columns.expand(3, -1))  # text: every column is there
            return whole.gather(1, rows[..., None].expand(-1, -1, whole.shape[-1]))

        cases = [(1, at(torch.tensor([length - 1]))), (3, whole[:, -3:]), (text, at(text)), (text - length, at(text))]
        try:
            plain = model.get_output_embeddings()(torch.zeros(3, length, 64))
            from transformers.modeling_utils import slice_logits_to_keep

            assert slice_logits_to_keep(plain, every).shape[1] == 2
            cases += [(every, at(every)), (only, whole[:, -2:].flatten(0, 1))]
        except ImportError:  # an older one takes tensors of one dimension
            pass
        for asked, want in cases:
            got = model(**inputs, logits_to_keep=asked, use_cache=False).logits
            assert torch.allclose(got, want, atol=1e-6)
    for asked, _ in cases:
        dense = model(**inputs, logits_to_keep=asked, use_cache=False).logits
        with vtc.compress(model, "random", keep=1.0):
            assert torch.equal(model(**inputs, logits_to_keep=asked, use_cache=False).logits, dense)


@pytest.mark.parametrize("method", ["random", "fastv"])
@torch.no_grad()
def test_columns_that_went_are_refused(method):
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    dense = model(**inputs).logits
    with vtc.compress(model, method, keep=0.2) as handle:
        model(**inputs)
        gone = int((~handle.kept[0]).nonzero().max())
        length = handle.kept.shape[1]
        only = torch.zeros(1, length, dtype=torch.bool)
        only[0, gone] = True
        tensors = torch.tensor([gone]), torch.tensor([gone - length]), torch.tensor([[0, gone]]), only
        for asked in (length - gone + 1, length, 10**6, *tensors):
            with pytest.raises(vtc.InputError, match=f"column ({gone}|[0-9]+) of prompt 0"):
                model(**inputs, logits_to_keep=asked)
        last = model(**inputs, logits_to_keep=length - gone).logits  # what is said where it was: of the next column
        whole = model(**inputs).logits
        assert torch.allclose(last, whole[:, -(length - gone) :], atol=1e-6)
    assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
@torch.no_grad()
def test_a_prompt_that_ends_with_its_image(name):
    """The answer starts from the last token that stays."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    stop = int(zoo.placeholders(model, inputs["input_ids"])[0].nonzero().max()) + 1
    inputs = {k: v[:, :stop] if v.shape == inputs["attention_mask"].shape else v for k, v in inputs.items()}
    with vtc.compress(model, "random", keep=0.2) as handle:
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, **options)
        kept = handle.kept
    assert not kept[0, -1]
    want = oracle(name, model, inputs, kept, steps=3, forced=out.sequences[:, -4:-1])
    assert torch.allclose(torch.cat(out.logits), torch.cat([want.prefill[0][-1:], want.decode[0]]), atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_labels_of_a_batch_with_a_longer_text(name, padding):
    """A text-only row keeps the whole width: the rows of the others move, and their labels with them. The loss is the
    tokens' that each row has alone; with shifted labels, and the number of items, the same."""
    model = zoo.build(name)
    single = zoo.alone(name, "ragged", 0)
    width = single["input_ids"].shape[1] + 3
    words = torch.randint(*zoo.TEXT_IDS, (1, width), generator=torch.Generator().manual_seed(2))
    front = (3, 0) if padding == "left" else (0, 3)
    pad = {key: torch.nn.functional.pad(single[key], front) for key in single if single[key].shape == (1, width - 3)}
    inputs = {**single, **{key: torch.cat([pad[key], torch.zeros_like(words)]) for key in pad}}
    inputs["input_ids"][1], inputs["attention_mask"][1] = words[0], 1
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(zoo.placeholders(model, inputs["input_ids"]), -100)
    labels[torch.arange(2), inputs["attention_mask"].argmax(1)] = -100  # nothing comes before a row's first
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    items = int((shifted != -100).sum())
    with vtc.compress(model, "random", keep=0.4) as handle, torch.no_grad():
        out = model(**inputs, labels=labels, use_cache=False)
        assert out.logits.shape[1] == width and not handle.kept.all()
        sums = []
        for row, real in enumerate(inputs["attention_mask"].bool()):
            alone = single if row == 0 else {"input_ids": words, "attention_mask": torch.ones_like(words)}
            if row and "token_type_ids" in single:
                alone["token_type_ids"] = torch.zeros_like(words)
            logits = model(**alone, use_cache=False).logits[0]
            columns = handle.kept[0] if row == 0 else torch.ones(width, dtype=torch.bool)
            own = labels[row, real][columns]
            sums.append(torch.nn.functional.cross_entropy(logits[:-1], own[1:], ignore_index=-100, reduction="sum"))
        given = {"labels": labels, "num_items_in_batch": items, "use_cache": False}
        again = model(**inputs, **given).loss
        moved = model(**inputs, **given, shift_labels=shifted).loss
    assert torch.allclose(out.loss, sum(sums) / items, atol=1e-5) and torch.allclose(out.loss, again, atol=1e-5)
    assert torch.allclose(moved, again, atol=1e-6)


def test_losses_of_the_callers_own():
    """By keyword or by place, as the model gives what it gives."""
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "single")
    seen = []

    def loss(logits, labels, vocab_size, **kwargs):
        seen.append((logits.shape, labels.shape, vocab_size))
        return logits.sum()

    model.loss_function = loss
    with vtc.compress(model, "random", keep=0.4), torch.no_grad():
        model(**inputs, labels=inputs["input_ids"])
        model.loss_function(torch.zeros(1, 3, 5), torch.zeros(1, 3), 5)
    assert seen[0][0][:2] == seen[0][1] and seen[1] == ((1, 3, 5), (1, 3), 5)
    assert model.loss_function is loss


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_the_first_column_is_said_by_nothing(name):
    """Of rows padded on the right, those that keep the most of their width are padded on the left then: the labels of
    their first columns are not said by padding."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged_right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad(), vtc.compress(model, "norm", keep=0.3) as handle:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        labels[:, 0] = -100
        assert torch.equal(model(**inputs, labels=labels, use_cache=False).loss, loss)
        columns = handle.patches[0].record.columns
        assert bool(((columns[:, :-1] < 0) & (columns[:, 1:] == 0)).any())  # or the case is none


def test_labels_outside_the_model():
    """Label smoothing compares logits with labels by itself: the labels of the columns that stay."""
    from transformers.trainer_pt_utils import LabelSmoother

    model, inputs = zoo.build("llava"), zoo.inputs("llava", "ragged_right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 0] = -100
    with vtc.compress(model, "random", keep=0.4) as handle, torch.no_grad():
        out = model(**inputs, use_cache=False)
        short = handle.take(labels, fill=-100)
        smooth = LabelSmoother(epsilon=0.0)(out, short, shift_labels=True)
        assert torch.allclose(smooth, model(**inputs, labels=labels, use_cache=False).loss, atol=1e-6)
        with pytest.raises(vtc.InputError, match="the prompt has"):
            handle.take(labels[:, 1:])


@pytest.mark.parametrize("method", ["random", "fastv"])
@torch.no_grad()
def test_tuples(method):
    """return_dict=False: the cache is shortened all the same."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    more = {"input_ids": torch.tensor([[7, 9]])}
    with vtc.compress(model, method, keep=0.4):
        turns = []
        for wanted in (True, False):
            out = model.model(**inputs, use_cache=True, return_dict=wanted)
            assert isinstance(out, tuple) != wanted
            cache = out[zoo.CACHE] if wanted else next(part for part in out if hasattr(part, "get_seq_length"))
            assert cache.get_seq_length() == inputs["input_ids"].shape[1]
            turns.append(model.model(**more, **{zoo.CACHE: cache}, use_cache=True, return_dict=wanted)[0])
    assert torch.equal(*turns)


def test_copies_have_their_own():
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "ragged")
    with vtc.compress(model, "random", keep=0.4), torch.no_grad():
        twin = copy.deepcopy(model)
        want = model(**inputs, logits_to_keep=3).logits
        assert twin.forward.parent is not model.forward.parent and twin.forward.module is twin
    with torch.no_grad():
        assert torch.equal(twin(**inputs, logits_to_keep=3).logits, want)
    vtc.remove(twin)
    assert "forward" not in twin.__dict__ and "create_masks_for_generate" not in twin.__dict__
