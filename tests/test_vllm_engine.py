"""vLLM with vtc gives what Transformers gives with vtc: by vLLM's own engine, on small random models.

`make vllm-check` runs this file in an environment with vLLM, which needs other versions than the development's.
"""

from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; run make vllm-check", allow_module_level=True)

import gc
import json
import os
import subprocess
import sys
from functools import cache

import mllm_zoo
import torch
import vllm_zoo as zoo
from vllm_server import Served, distance

import vtc.vllm
from vtc.checkpoints import tiny
from vtc.errors import OptionError, VTCError
from vtc.methods import make
from vtc.vllm import plugin
from vtc.vllm.evidence import READ
from vtc.vllm.settings import VARIABLE

METHODS = {
    name: make(name, keep=0.25)
    for name in ("random", "downsample", "norm", "divprune", "tome", "pitome", "dpc_knn", "visionzip", "hiprune")
}
METHODS |= {
    f"{name}, norm": make(name, keep=0.25, importance="norm")
    for name in ("idpruner", "scope", "zoo_prune", "cdpruner", "vispruner")
}
METHODS |= {name: make(name, keep=0.25) for name in ("idpruner", "scope", "vispruner")}  # by the tower's attention
EC = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
MOST = 5e-5  # of a log-probability


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a model, made once."""

    @cache
    def made(name):
        return str(tiny.folder(name)) if name in tiny.TINY else zoo.save(name, tmp_path_factory.mktemp(name))

    return made


@pytest.fixture
def served(folder):
    """Engines, which are shut down behind the test."""
    engines = []

    def start(name, method, **more):
        more = {"max_model_len": 2048} | more if name == "tiny_qwen" else more
        engines.append(Served(folder(name), method, **more))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
    vtc.vllm.disable()
    gc.collect()


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "every"])
@pytest.mark.parametrize(
    ("name", "positions"), [*((name, "keep") for name in (*zoo.FAMILIES, "tiny_qwen")), ("llava", "compact")]
)
def test_every_method_answers_as_in_transformers(served, folder, name, positions, every):
    """Every method with an image alone and with two of the other cases together, which take turns."""
    engine, reference = served(name, METHODS["random"], positions=positions), zoo.Reference(folder(name))
    cases = zoo.cases(name)
    others = [case for case in cases if case != "tall"]
    far = {}
    for turn, (label, method) in enumerate(METHODS.items()):
        engine.use(method)
        first = engine.answers([cases["tall"]])  # its image alone; the others' come together
        order = ["tall", *(others if every else [others[(turn + i) % len(others)] for i in range(2)])]
        rest = [cases[case] for case in order[1:]]
        for case, answer in zip(order, first + engine.answers(rest), strict=True):
            asked = cases[case]
            off = distance(answer, *reference.answer(asked, method, compact=positions == "compact"))
            if off > MOST:
                far[label, case] = off
    assert not far


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's processor
@pytest.mark.parametrize("name", zoo.MORE)
def test_other_families_answer_as_in_transformers(served, folder, name):
    engine, reference = served(name, METHODS["divprune"]), zoo.Reference(folder(name))
    cases = zoo.cases(name)
    # on a processor vLLM's experts add in a way of their own: words alone are 6e-3 away from Transformers'
    most = 2e-2 if name == "qwen3_vl_moe" else MOST
    for label in ("divprune", "tome") if name == "internvl" else ("divprune", "tome", "visionzip", "hiprune"):
        method = METHODS[label]
        engine.use(method)
        for (case, asked), answer in zip(cases.items(), engine.answers(list(cases.values())), strict=True):
            off = distance(answer, *reference.answer(asked, method))
            assert off < most, (label, case)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_two_ranks_answer_as_in_transformers(method):
    """Each has half of the heads; one decides. In a process of its own, which the workers are made from."""
    code = "import sys, vllm_ranks; vllm_ranks.main(*sys.argv[1:])"
    options = json.dumps({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"})
    env = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", code, "qwen2_5_vl", method, options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < MOST


def test_all_ranks_take_what_the_first_decided(monkeypatch):
    from vllm import distributed

    from vtc.token_map import TokenMap
    from vtc.vllm.model import _agreed

    first, own = (TokenMap.from_anchors(torch.arange(6)[None] % 3 == i) for i in (0, 1))
    sent = iter([first.group, first.anchor, first.size])

    class Group:
        world_size = 2

        def broadcast(self, x):
            return next(sent)

    monkeypatch.setattr(distributed, "get_tp_group", Group)
    taken = _agreed(own)
    assert torch.equal(taken.group, first.group) and torch.equal(taken.anchor, first.anchor)


def test_equal_patches_are_decided_by_rounding_alone(served, folder):
    """Drawn pictures have many patches that are alike, and the two towers round differently in the seventh digit: which
    of them stay, or go where, differs then. Given the same rows, the answers are the same."""
    engine, reference = served("tiny_qwen", METHODS["random"]), zoo.Reference(folder("tiny_qwen"))
    cases = [(zoo.prompt("tiny_qwen", 1), [zoo.drawn(seed)]) for seed in range(4)]
    rows = []

    def encoded(words, pictures):
        inputs = reference.processor(text=words, images=pictures, return_tensors="pt")
        with torch.no_grad():
            out = reference.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.cat(list(out.pooler_output))

    engine.llm.apply_model(lambda model: setattr(model.visual, "forward", lambda x, grid_thw: rows[-1]))
    for case in cases:
        rows.append(encoded(*case))
        for method in METHODS.values():
            if method.needs & READ:
                continue  # the tower, which has its rows from here, does not attend
            engine.use(method)
            assert distance(engine.answers([case])[0], *reference.answer(case, method)) < MOST, method.name


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_what_keeps_all_is_vllm_to_the_bit(served, name):
    cases = list(zoo.cases(name).values())
    plain = served(name, None).answers(cases)
    engine = served(name, METHODS["tome"])
    assert engine.answers(cases, keeps=[1.0] * len(cases)) == plain
    assert engine.answers(cases[:1]) != plain[:1]  # vtc is there
    again = served(name, None)
    assert again.answers(cases) == plain and not hasattr(again.model(), "vtc_method")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
@pytest.mark.parametrize("chunk", [24, 32])
def test_chunks_of_a_prefill_may_cut_an_image(served, folder, name, chunk):
    """And sequences beside it; a step takes `chunk` tokens of all requests together."""
    method = make("divprune", keep=0.7)
    small = {} if name == "llava" else zoo.SMALL_IMAGES
    engine = served(name, method, max_num_batched_tokens=chunk, max_num_seqs=2, **small)
    reference, cases = zoo.Reference(folder(name)), zoo.cases(name)
    for (case, asked), answer in zip(cases.items(), engine.answers(list(cases.values())), strict=True):
        assert distance(answer, *reference.answer(asked, method)) < MOST, case


def test_a_prefix_hit_may_resume_inside_an_image(served, folder):
    method = make("divprune", keep=0.9)
    engine, reference = served("qwen2_5_vl", method), zoo.Reference(folder("qwen2_5_vl"))
    words, pictures = zoo.cases("qwen2_5_vl")["square"]
    engine.answers([(words, pictures)])
    other = words.replace("what is this", "w9 w8 is this")
    for asked, blocks in ((words, 2), (other, 1)):  # of 32 tokens; the image has 58, behind two words
        answer = engine.answers([(asked, pictures)])[0]
        assert engine.cached == 32 * blocks
        assert distance(answer, *reference.answer((asked, pictures), method)) < MOST


def test_budgets_never_share_an_entry_of_a_cache(served, folder):
    engine, reference = served("qwen2_5_vl", METHODS["divprune"]), zoo.Reference(folder("qwen2_5_vl"))
    asked = zoo.cases("qwen2_5_vl")["wide"]
    keeps = [0.25, 0.5, 1.0, 7, None, 0.5, 0.25]
    answers = engine.answers([asked] * len(keeps), keeps) + [engine.answers([asked], [keep])[0] for keep in keeps]
    for keep, answer in zip(keeps * 2, answers, strict=True):
        method = make("divprune", keep=0.25 if keep is None else keep)
        assert answer[2] == 10 + {0.25: 12, 0.5: 24, 1.0: 48, 7: 7, None: 12}[keep]
        assert distance(answer, *reference.answer(asked, method)) < MOST


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5: out of range"),
        ({"keep": "half"}, "keep='half'"),
        ({"keep": 500}, "keep=500 is more than the 48 tokens of an image"),
        ({"keep": 0.5, "method": "tome"}, "a request gives its budget and nothing else"),
        (0.5, "a request gives its budget and nothing else"),
    ],
)
def test_a_request_is_refused_and_the_server_lives(engine, given, says):
    from vllm import SamplingParams

    words, pictures = zoo.cases("qwen2_5_vl")["wide"]
    request = {"prompt": words, "multi_modal_data": {"image": pictures}, "mm_processor_kwargs": {"vtc": given}}
    with pytest.raises(OptionError, match=says):
        engine.llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
    assert engine.answers([(words, pictures)])[0][2] == 22


@pytest.fixture(scope="module")
def engine(folder):
    engine = Served(folder("qwen2_5_vl"), METHODS["divprune"])
    yield engine
    engine.close()
    vtc.vllm.disable()


def test_a_prompt_must_go_on_behind_its_last_image(engine):
    words, pictures = zoo.cases("qwen2_5_vl")["wide"]
    with pytest.raises(OptionError, match="ends in an image"):
        engine.answers([("user <|vision_start|> <|image_pad|>", pictures)])


def test_positions_are_right_in_bfloat16():
    """Rows and columns above 256 would be rounded there."""
    from vtc.vllm.model import BASE, _digits

    grid = (3, 1021)
    places = torch.arange(3 * 1021)
    digits = _digits(places, grid).bfloat16().long()
    assert torch.equal(digits[:, 0] * BASE + digits[:, 1], places // 1021)
    assert torch.equal(digits[:, 2] * BASE + digits[:, 3], places % 1021)


def test_requests_that_were_preempted_go_on(served, folder):
    """The cache holds less than the requests need, so that some are thrown out and read again."""
    method = make("tome", keep=0.5)
    engine = served("qwen2_5_vl", method, num_gpu_blocks_override=6, max_model_len=128)
    reference, cases = zoo.Reference(folder("qwen2_5_vl")), zoo.cases("qwen2_5_vl")
    asked = [cases[case] for case in ("wide", "tall", "square") for _ in range(2)]
    answers = engine.answers(asked, max_tokens=40, min_tokens=40)
    assert engine.preempted > 0
    for case, answer in zip(asked, answers, strict=True):
        tokens, logits = reference.answer(case, method, steps=40)
        assert distance(answer, tokens, logits) < MOST


def test_the_tower_never_gets_more_than_was_measured(served):
    engine = served("qwen2_5_vl", METHODS["divprune"], max_num_batched_tokens=128, **zoo.SMALL_IMAGES)
    batches = []

    def watch(model):
        forward = model.visual.forward
        model.visual.forward = lambda x, grid_thw: batches.append(len(x) // 4) or forward(x, grid_thw=grid_thw)

    engine.llm.apply_model(watch)
    engine.answers([zoo.cases("qwen2_5_vl")[case] for case in ("wide", "tall", "square") * 2])
    assert len(batches) > 1 and max(batches) <= 128


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_compiled_decoder_answers_the_same(served, folder, name):
    engine, reference = served(name, METHODS["tome"], enforce_eager=False), zoo.Reference(folder(name))
    cases = zoo.cases(name)
    for (case, asked), answer in zip(cases.items(), engine.answers(list(cases.values())), strict=True):
        assert distance(answer, *reference.answer(asked, METHODS["tome"])) < MOST, case


def test_the_environment_alone_is_enough(folder):
    """As in a server that somebody else starts."""
    code = "from vllm.engine.arg_utils import EngineArgs as E; E(model={!r}, max_model_len=512).create_engine_config()"
    command, env = (
        [sys.executable, "-c", code.format(folder("qwen2_5_vl"))],
        os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
    )
    done = subprocess.run(command, env=env | {VARIABLE: "divprune:keep=0.5"}, capture_output=True, text=True)
    assert "vtc: divprune, keep=0.5, positions kept, Qwen2.5-VL; videos are refused" in done.stdout + done.stderr
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "vtc:" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("qwen2_5_vl", {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: only the first stage learns"),
        ("qwen2_5_vl", {"limit_mm_per_prompt": {"video": 1}}, "does not reduce videos in vLLM yet"),
        ("qwen2_5_vl", {"video_pruning_rate": 0.5}, "beside vLLM's video_pruning_rate"),
        ("qwen2_5_vl", {"mm_processor_kwargs": {"vtc": {"keep": 0.5}}}, "the server's own budget stands in VTC_VLLM"),
        (
            "qwen2_5_vl",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        ("qwen2_5_vl", {"enable_mm_embeds": True}, "embeddings in place of images were not tried"),
        ("qwen2_5_vl", {"enable_lora": True, "enable_tower_connector_lora": True}, "counts the tower's tokens"),
        ("qwen2_5_vl", {"ec_transfer_config": EC}, "an encoder on another machine was not tried"),
        ("qwen2_5_vl", {"model_impl": "transformers"}, "does not serve TransformersMultiModalForCausalLM"),
        ("gemma3", {}, "vtc does not serve Gemma3.* in vLLM .its image tokens see each other.*it serves Qwen2-VL"),
    ],
)
def test_what_is_not_served_is_refused_before_anything_is_loaded(folder, tmp_path, name, options, says):
    from vllm.engine.arg_utils import EngineArgs

    vtc.vllm.enable("divprune", keep=0.5)
    if name == "gemma3":
        config = mllm_zoo.FAMILIES[name].config()
        config.architectures = ["Gemma3ForConditionalGeneration"]
        config.save_pretrained(tmp_path)
        where = str(tmp_path)
    else:
        where = folder(name)
    try:
        with pytest.raises(VTCError, match=says):
            EngineArgs(
                model=where, skip_tokenizer_init=name == "gemma3", **{"max_model_len": 512, **options}
            ).create_engine_config()
    finally:
        vtc.vllm.disable()


def test_a_class_that_is_not_ours_is_refused(folder):
    """Of another plug-in, or one that vLLM remembers."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs

    vtc.vllm.enable("divprune", keep=0.5)
    ModelRegistry.models.update(plugin._replaced)
    try:
        with pytest.raises(VTCError, match="by Qwen2_5_VLForConditionalGeneration, which vtc does not reduce"):
            EngineArgs(model=folder("qwen2_5_vl"), max_model_len=512).create_engine_config()
    finally:
        vtc.vllm.disable()


def test_a_wrong_setting_stops_the_start(tmp_path):
    """One line is the last one, and the exit code says so."""
    command = [sys.executable, "-c", "from vllm.engine.arg_utils import EngineArgs; EngineArgs(model='x')"]
    done = subprocess.run(command, env=os.environ | {"VTC_VLLM": "fastv:keep=0.5"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fastv removes tokens between the decoder's layers" in done.stderr.strip().splitlines()[-1]
