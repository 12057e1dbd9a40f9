"""Retrieval models by many vectors a page: the embeddings of a compressed one are those of the plain one, given exactly
the columns that stay, at their own positions."""

import copy
from importlib.util import find_spec

import mllm_zoo as zoo
import pytest
import torch
import transformers
from mllm_oracle import _masks
from torch import nn

import vtc

HF = {
    "ColPaliForRetrieval": "paligemma",
    "ColQwen2ForRetrieval": "qwen2_vl",
    "ColQwen2ForRetrieval of Qwen2.5": "qwen2_5_vl",
}
ENGINE = {  # of colpali-engine: `make retrieval-check` has it
    "ColPali": "paligemma",
    "ColQwen2": "qwen2_vl",
    "ColQwen2_5": "qwen2_5_vl",
    "ColQwen3": "qwen3_vl",
    "ColGemma3": "gemma3",
    "ColIdefics3": "idefics3",
}
KINDS = {**HF, **(ENGINE if find_spec("colpali_engine") else {})}
ROWS = {"alone": [[5, zoo._image(0), 7]], "ragged": [[5, zoo._image(0), 7], [2, zoo._image(1), 3]]}
QUERY = [[6], [4]]


def build(kind):
    if kind in HF:
        return zoo.retriever(kind.partition("For")[0].lower(), HF[kind])
    from colpali_engine import models

    torch.manual_seed(0)
    return zoo.randomise(getattr(models, kind)(zoo.FAMILIES[ENGINE[kind]].config()))


def inputs(kind, rows):
    """A batch padded on the left, as the processors make it."""
    name = KINDS[kind]
    drawn = [zoo._draw(name, prompt, row, 0) for row, prompt in enumerate(rows)]
    made = zoo._assemble(name, drawn)
    if "Qwen" in kind and "pixel_values" in made:  # a row for every image, as long as the longest
        pixels = [item.pixels for _, items in drawn for item in items]
        made["pixel_values"] = nn.utils.rnn.pad_sequence(pixels, True)
    if kind.startswith("ColQwen2For"):
        made.pop("mm_token_type_ids", None)
    return made


def vectors(output):
    return output if isinstance(output, torch.Tensor) else output.embeddings


def run(model, given):
    with torch.no_grad():
        return vectors(model(**given))


def decoder(model):
    return next(m for name, m in model.named_modules() if name.split(".")[-1] in ("language_model", "text_model"))


def entered(model, given):
    """What the plain model hands to its decoder."""
    seen = {}
    hook = decoder(model).register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    run(model, given)
    hook.remove()
    return seen


def placeholders(model, given):
    return given["input_ids"] == (getattr(model.config, "vlm_config", None) or model.config).image_token_id


def expected(model, kind, given, kept, reduced):
    """The embeddings of every row's `kept` columns [B, L], by the plain decoder; `reduced` makes the features that stay
    of those of all images."""
    seen, text = entered(model, given), decoder(model)
    embeds, mask = seen["inputs_embeds"].clone(), given["attention_mask"].bool()
    visual = placeholders(model, given)
    embeds[visual & kept] = reduced(embeds[visual])
    places = seen.get("position_ids")
    places = torch.arange(embeds.shape[1])[None] if places is None else places
    places = places[-3:] if places.ndim == 3 else places
    places = places.expand(*places.shape[:-2], len(embeds), -1)
    found = []
    for row in range(len(embeds)):
        columns = kept[row] & mask[row]
        block = torch.full((len(columns),), -1)
        if KINDS[kind] == "paligemma":
            block[:] = 0  # all of a prompt is its prefix
        elif KINDS[kind] == "gemma3":
            block[visual[row]] = 0
        more = {}
        if seen.get("deepstack_visual_embeds"):
            mine = (visual & kept).nonzero()[:, 0] == row
            more["visual_pos_masks"] = visual[row, columns][None]
            more["deepstack_visual_embeds"] = [reduced(x)[mine] for x in seen["deepstack_visual_embeds"]]
        with torch.no_grad():
            hidden = text(
                inputs_embeds=embeds[row, columns][None],
                attention_mask=_masks(text, block[columns], embeds.dtype),
                position_ids=places[..., row : row + 1, :][..., columns],
                use_cache=False,
                **more,
            ).last_hidden_state[0]
            parts = dict(model.named_children())
            head = next(parts[name] for name in ("embedding_proj_layer", "custom_text_proj", "linear") if name in parts)
            found.append(nn.functional.normalize(head(hidden), dim=-1))
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", ["divprune", "dpc_knn"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_columns_that_stay(kind, method, rows):
    model, given = build(kind), inputs(kind, ROWS[rows])
    plain = copy.deepcopy(model)
    with vtc.compress(model, method, keep=0.5) as handle:
        found = run(model, given)
    kept, token_map, lengths = handle.kept, handle.token_map, handle.report.before
    assert int(token_map.mask().sum()) < sum(lengths)

    def reduced(features):
        units = nn.utils.rnn.pad_sequence(features.split(lengths), True)
        return (token_map.merge if method == "dpc_knn" else token_map.gather)(units)[token_map.mask()]

    for row, want in enumerate(expected(plain, kind, given, kept, reduced)):
        got = found[row][found[row].abs().sum(-1) > 0]
        assert len(got) == int((kept[row] & given["attention_mask"][row].bool()).sum())
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_with_every_token_in_a_query_or_afterwards(kind):
    model = build(kind)
    pages, query = inputs(kind, ROWS["ragged"]), inputs(kind, QUERY)
    dense, asked, before = run(model, pages), run(model, query), zoo.fingerprint(model)  # a first call leaves hooks
    with vtc.compress(model, "divprune", keep=1.0):
        assert torch.equal(run(model, pages), dense)
        assert torch.equal(run(model, query), asked)
    with vtc.compress(model, "divprune", keep=0.5):
        short = run(model, pages)
        assert short.shape[1] < dense.shape[1]
        assert torch.equal(run(model, query), asked)
    assert torch.equal(run(model, pages), dense)
    assert zoo.fingerprint(model) == before


@pytest.mark.parametrize("options", [{}, {"positions": "ppe"}, {"proportional": True}])
@pytest.mark.parametrize("kind", HF)
def test_other_ways_to_reduce(kind, options):
    model, given = build(kind), inputs(kind, ROWS["ragged"])
    with vtc.compress(model, "dpc_knn", keep=0.5, **options) as handle:
        found = run(model, given)
        assert (found.abs().sum(-1) > 0).sum(1).tolist() == [
            int((kept & mask.bool()).sum()) for kept, mask in zip(handle.kept, given["attention_mask"], strict=True)
        ]


@pytest.mark.parametrize("method", [vtc.FastV(keep=0.5), vtc.DPCKNN(keep=0.5, cascade=((1, 0.5),))])
def test_methods_between_the_layers_are_refused(method):
    with pytest.raises(vtc.UnsupportedModelError, match="ColPaliForRetrieval multiplies its embeddings by the mask"):
        vtc.compress(build("ColPaliForRetrieval"), method)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_a_model_of_its_own(kind):
    model, given = build(kind), inputs(kind, ROWS["ragged"])
    dense = run(model, given)
    with vtc.compress(model, "divprune", keep=0.5):
        short, other = run(model, given), copy.deepcopy(model)
    assert torch.equal(run(other, given), short) and torch.equal(run(model, given), dense)
    vtc.remove(other)
    assert torch.equal(run(other, given), dense)


class Doubled(transformers.ColPaliForRetrieval):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).embeddings * 2


def test_a_forward_of_its_own_is_refused():
    model = build("ColPaliForRetrieval")
    model.__class__ = Doubled
    with pytest.raises(vtc.UnsupportedModelError, match="Doubled has a forward that is not that of transformers'"):
        vtc.compress(model, "divprune", keep=0.5)


def test_the_model_inside_is_not_called_past_the_patch():
    model, given = build("ColPaliForRetrieval"), inputs("ColPaliForRetrieval", ROWS["alone"])
    with vtc.compress(model, "divprune", keep=0.5):
        with pytest.raises(vtc.InputError, match="ColPaliForRetrieval's own forward"):
            model.vlm(**given)
        run(model, given)


def test_pixels_beside_embeddings_are_refused():
    """The model would leave them aside."""
    kind = "ColQwen2ForRetrieval"
    model, given = build(kind), inputs(kind, ROWS["alone"])
    given["inputs_embeds"] = model.vlm.get_input_embeddings()(given["input_ids"]).detach()
    with vtc.compress(model, "divprune", keep=0.5), pytest.raises(vtc.InputError, match="give input_ids"):
        model(**given)


@pytest.mark.parametrize("wrong", ["rows", "patches"])
def test_pixels_that_do_not_fit_their_grid(wrong):
    kind = "ColQwen2ForRetrieval"
    model, given = build(kind), inputs(kind, ROWS["ragged"])
    cut = {"rows": lambda x: x[:1], "patches": lambda x: x[:, :3]}[wrong]
    given["pixel_values"] = cut(given["pixel_values"])
    with vtc.compress(model, "divprune", keep=0.5), pytest.raises(vtc.InputError, match="a row for each image"):
        model(**given)


# -- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ColQwen2 with its processor, as sentence-transformers loads one."""
    pytest.importorskip("sentence_transformers", minversion="6")
    from vtc.checkpoints import tiny

    source, target = tiny.folder("tiny_qwen"), tmp_path_factory.mktemp("colqwen")
    inner = transformers.AutoConfig.from_pretrained(source)
    model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=inner.to_dict(), embedding_dim=16))
    zoo.randomise(model).save_pretrained(target)
    parts = [auto.from_pretrained(source) for auto in (transformers.AutoImageProcessor, transformers.AutoTokenizer)]
    transformers.ColQwen2Processor(*parts).save_pretrained(target)
    return target


@pytest.mark.parametrize("image_tokens_only", [False, True])
def test_a_pipeline_of_sentence_transformers(folder, image_tokens_only):
    from PIL import Image
    from sentence_transformers import MultiVectorEncoder

    pipeline = MultiVectorEncoder(str(folder), device="cpu")
    token = pipeline[0].model.config.vlm_config.image_token_id
    if image_tokens_only:
        pipeline[1].keep_only_token_ids = [token]
    photo = Image.open("vtc/assets/photo.jpg").convert("RGB")
    pages = [photo.resize((256, 128)), photo.crop((0, 0, 200, 200)).resize((192, 192))]
    dense, query = pipeline.encode_document(pages), pipeline.encode_query(["red circle", "what"])
    made = pipeline[0].preprocess(pages)
    given = {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    with vtc.compress(pipeline, "divprune", keep=0.5) as handle:
        found, asked = pipeline.encode_document(pages), pipeline.encode_query(["red circle", "what"])
        with torch.no_grad():
            alone = pipeline[0].model(**given).embeddings
    for row, (short, full) in enumerate(zip(found, dense, strict=True)):
        assert len(short) < len(full)
        want = alone[row][alone[row].abs().sum(-1) > 0]
        if image_tokens_only:
            ids = handle.take(given["input_ids"], -1)[row]
            want = alone[row][ids == token]
        torch.testing.assert_close(torch.as_tensor(short), want, atol=1e-5, rtol=0)
    for a, b in zip(query, asked, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for a, b in zip(dense, pipeline.encode_document(pages), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_pipeline_that_pools_to_one_vector():
    """Around a model without a head of its own; the mean is over the columns that stay."""
    pytest.importorskip("sentence_transformers", minversion="6")
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from vtc.checkpoints import tiny

    first = Transformer(str(tiny.folder("tiny_qwen")))
    zoo.randomise(first.model.float())
    pipeline = SentenceTransformer(modules=[first, Pooling(192, pooling_mode="mean")], device="cpu")
    pages = [Image.open("vtc/assets/photo.jpg").convert("RGB").resize((width, 128)) for width in (192, 256)]
    dense = torch.as_tensor(pipeline.encode(pages))
    with vtc.compress(pipeline, "divprune", keep=0.5) as handle:
        found = torch.as_tensor(pipeline.encode(pages))
        for page, got in zip(pages, found, strict=True):
            made = first.preprocess([page])
            given = {name: made[name] for name in made if name in ("input_ids", "pixel_values", "image_grid_thw")}
            with torch.no_grad():
                rows = first.model(**given, mm_token_type_ids=made["mm_token_type_ids"]).last_hidden_state[0]
            assert len(rows) == int(handle.kept.sum()) < handle.kept.shape[1]
            torch.testing.assert_close(got, rows.mean(0), atol=1e-5, rtol=0)
    assert not torch.allclose(found, dense, atol=1e-3)
    assert torch.equal(torch.as_tensor(pipeline.encode(pages)), dense)


# -- where the tower is most of the work ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_tower_of_colmodernvbert():
    """Its decoder's windows count columns, so tokens merge in its tower, and are copied back."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 8}
    inner = transformers.ModernVBertConfig(
        text_config={**text, "model_type": "modernbert", "sep_token_id": 2},
        vision_config={**vision, "model_type": "siglip_vision_model"},
        pixel_shuffle_factor=2,
        image_token_id=5,
    )
    model = transformers.ColModernVBertForRetrieval(
        transformers.ColModernVBertConfig(vlm_config=inner, embedding_dim=8)
    ).eval()
    ids = torch.tensor([[1, *[5] * 16, 7, 8]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 1, 3, 64, 64)}
    dense = run(model, given)
    with vtc.compress(model, "tome", keep=0.8) as handle:
        found = run(model, given)
        assert handle.report.before == (64,) and handle.report.after[0] < 64
    assert found.shape == dense.shape and not torch.equal(found, dense)
    assert torch.equal(run(model, given), dense)
    with pytest.raises(vtc.UnsupportedModelError, match="ColModernVBertForRetrieval|divprune"):
        vtc.compress(model, "divprune", keep=0.5)


@torch.no_grad()
def test_the_tower_of_colsmol():
    pytest.importorskip("colpali_engine")
    model, given = build("ColIdefics3"), inputs("ColIdefics3", ROWS["ragged"])
    dense = run(model, given)
    with vtc.compress(model, "tome", keep=0.8, where="tower") as handle:
        found = run(model, given)
        assert sum(handle.report.after) < sum(handle.report.before)
    assert found.shape == dense.shape and not torch.equal(found, dense)
    assert torch.equal(run(model, given), dense)


def test_colqwen3_5_is_refused_for_its_forward():
    """It is built on a class without a family file, which is tried as it is."""
    models = pytest.importorskip("colpali_engine").models
    import mllm_classes

    model = models.ColQwen3_5(mllm_classes.build("qwen3_5").config).eval()
    with pytest.raises(vtc.UnsupportedModelError, match="a forward that is not that of transformers' Qwen3_5Model"):
        vtc.compress(model, "divprune", keep=0.5)
