"""The command line on multimodal LLMs: tiny models with random weights, saved with processors made by hand."""

import json
import shutil

import mllm_classes
import mllm_zoo as zoo
import pytest
import torch
from PIL import Image

import vtc
from vtc.cli import command as cli

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 100)), "what", "is", "this", "?", "\n", "user"]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}MARK\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer(special):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate([*WORDS, *(f"x{i}" for i in range(len(WORDS), 110))])}
    inside = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inside.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert made.convert_tokens_to_ids(special[0]) == zoo.IMAGE
    return made


def llava():
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, do_center_crop=True
    )
    return transformers.LlavaProcessor(
        pictures, tokenizer(["<image>"]), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("MARK", "<image>"),
    )  # fmt: skip


def qwen():
    pictures = transformers.Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    video = transformers.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    template = TEMPLATE.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")
    return transformers.Qwen2_5_VLProcessor(pictures, tokenizer(marks), video, chat_template=template)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models with their processors, and a photograph."""
    root = tmp_path_factory.mktemp("models")
    for name, processor in (("llava", llava()), ("qwen2_5_vl", qwen())):
        zoo.build(name).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    for number in range(2):
        noise = torch.rand(48, 60, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte()
        Image.fromarray(noise.numpy()).save(root / f"{number}.png")
    return root


@pytest.fixture
def vtc_(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        code = cli.main([str(each) for each in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def fails(vtc_):
    """The command must end with 2 and say one line, which is returned."""

    def call(*arguments):
        code, out, err = vtc_(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("vtc: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return call


# -- run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_run(vtc_, folders, name):
    asked = ["run", "--model", folders / name, "--image", folders / "0.png", "--prompt", "what is this ?"]
    code, text, err = vtc_(*asked, "--method", "random", "--keep", 0.25, "--max-new-tokens", 4, "--repeats", 1)
    assert code == 0, err
    for words in ("Random(keep=0.25)", "what is this ?", "visual tokens", "first token", "per second", "KV cache"):
        assert words in text, words


def test_run_json(vtc_, folders):
    asked = ["run", "--model", folders / "llava", "--image", folders / "0.png", "--image", folders / "1.png"]
    small = ["--max-new-tokens", 5, "--repeats", 1, "--json"]
    code, text, err = vtc_(*asked, "--prompt", "what is this ?", "--method", "tome", "--tokens", 10, *small)
    assert code == 0, err
    found = json.loads(text)
    dense, less = found["dense"], found["compressed"]
    assert (dense["visual"], less["visual"]) == (50, 20)
    assert dense["prompt"] - less["prompt"] == 30
    assert dense["generated"] == less["generated"] == 5
    per_token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, float32
    assert (dense["kv_bytes"], less["kv_bytes"]) == (dense["prompt"] * per_token, less["prompt"] * per_token)
    assert 0 < found["method_seconds"] < less["first_seconds"] and found["speedup_first_token"] > 0
    assert dense["decode_rate"] > 0 and less["decode_rate"] > 0
    assert found["report"]["macs_ratio"] < 1 and found["environment"]["torch"] == torch.__version__


def test_run_says_what_the_model_says(vtc_, folders):
    """Both answers are those of `generate` in Python, and keep=1 gives the dense one twice."""
    from vtc.models.images import load_image
    from vtc.models.llms import build_inputs as question

    model = transformers.AutoModelForImageTextToText.from_pretrained(folders / "llava").eval()
    processor = transformers.AutoProcessor.from_pretrained(folders / "llava")
    image = load_image(folders / "0.png")
    inputs = question(processor, [image], "what is this ?")
    assert (inputs["input_ids"] == zoo.IMAGE).sum() == 25

    def answer():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    dense = answer()
    with vtc.compress(model, "random", keep=0.2):
        less = answer()
    asked = ["run", "--model", folders / "llava", "--image", folders / "0.png", "--prompt", "what is this ?"]
    small = ["--method", "random", "--max-new-tokens", 6, "--repeats", 1, "--json"]
    found = json.loads(vtc_(*asked, *small, "--keep", 0.2)[1])
    assert (found["dense"]["answer"], found["compressed"]["answer"]) == (dense, less)
    found = json.loads(vtc_(*asked, *small, "--keep", 1)[1])
    assert found["dense"]["answer"] == found["compressed"]["answer"] == dense


def test_run_in_the_tower(vtc_, fails, folders):
    small = ["--image", folders / "0.png", "--max-new-tokens", 3, "--repeats", 1, "--json"]
    code, text, err = vtc_(
        "run", "--model", folders / "llava", "--method", "tome", "--tokens", 9, "--where", "tower", *small
    )
    assert code == 0, err
    found = json.loads(text)
    assert found["compressed"]["visual"] == 9 and found["method_seconds"] is None
    message = fails(
        "run", "--model", folders / "qwen2_5_vl", "--method", "tome", "--tokens", 9, "--where", "tower", *small
    )
    assert "tower" in message


def test_run_pooled(vtc_, folders):
    asked = [
        "run",
        "--model",
        folders / "llava",
        "--image",
        folders / "0.png",
        "--image",
        folders / "1.png",
        "--pooled",
    ]
    code, text, err = vtc_(*asked, "--method", "norm", "--keep", 0.5, "--max-new-tokens", 2, "--repeats", 1, "--json")
    assert code == 0, err
    assert json.loads(text)["compressed"]["visual"] == 25


def test_run_without_a_chat_template(vtc_, fails, folders, tmp_path):
    """The placeholder goes in front, unless the prompt has it."""
    shutil.copytree(folders / "llava", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    small = ["--method", "random", "--image", folders / "0.png", "--max-new-tokens", 2, "--repeats", 1, "--json"]
    for prompt in ("what is this ?", "what is <image> ?"):
        code, text, err = vtc_("run", "--model", tmp_path / "bare", "--prompt", prompt, *small)
        assert code == 0, err
        assert json.loads(text)["dense"]["visual"] == 25
    message = fails("run", "--model", tmp_path / "bare", "--prompt", "<image> <image> ?", *small)
    assert "2 image placeholders" in message and "1 image" in message


def test_run_dtype(vtc_, folders):
    asked = ["run", "--model", folders / "llava", "--image", folders / "0.png", "--dtype", "bfloat16"]
    code, text, err = vtc_(*asked, "--method", "random", "--max-new-tokens", 2, "--repeats", 1, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["environment"]["dtype"] == "bfloat16"
    assert found["dense"]["kv_bytes"] == found["dense"]["prompt"] * 3 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--image", "no/such.jpg"], ["no/such.jpg", "no such file"]),
        (["--method", "tomme"], ["'tomme'", "did you mean 'tome'"]),
        (["--tokens", "26"], ["26", "25"]),
        (["--flops", "0.5"], ["--flops", "encoder"]),
        (["--size", "224"], ["--size", "encoder"]),
        (["--keep", "2"], ["--keep", "2"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--where", "nowhere"], ["--where", "tower"]),
        (["--where", "tower", "--method", "random", "--keep", "0.3"], ["0.3", "at least half"]),
        (["--where", "tower", "--method", "idpruner"], ["idpruner", "decoder's input"]),
        (["--device", "nowhere"], ["'nowhere'"]),
        (["--prompt", "<image> <image> this"], ["2 image placeholders", "1 image"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_run_bad_input(fails, folders, arguments, names):
    image = [] if "--image" in arguments else ["--image", folders / "0.png"]
    method = [] if "--method" in arguments else ["--method", "random"]
    message = fails("run", "--model", folders / "llava", "--repeats", 1, *image, *method, *arguments)
    for name in names:
        assert name in message


def test_run_bad_models(fails, folders, tmp_path):
    image = ["--image", folders / "0.png"]
    assert "no such folder" in fails("run", "--model", "./nowhere", *image)
    message = fails("run", "--model", "nobody/nothing", *image)
    assert "nobody/nothing" in message and "network" in message
    assert "config.json" in fails("run", "--model", folders, *image)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.save_pretrained(tmp_path / "vit")
    assert "no multimodal LLM" in fails("run", "--model", tmp_path / "vit", *image)
    assert "no multimodal LLM" in fails("run", "--model", "timm:test_vit", *image)
    zoo.FAMILIES["gemma3"].config().save_pretrained(tmp_path / "gemma3")  # refused before any weights are looked for
    assert "windows" in fails("run", "--model", tmp_path / "gemma3", *image, "--method", "fastv")
    assert "--model" in fails("run", "--prompt", "what is this ?")
    assert "--image" in fails("run", *image, *image)


@pytest.mark.parametrize(
    ("gone", "names"),
    [
        (["processor_config.json"], ["image processor"]),
        (["tokenizer.json", "tokenizer_config.json"], ["processor"]),
        (["model.safetensors"], ["weights"]),
    ],
    ids=lambda value: value[0],
)
def test_run_missing_pieces(fails, folders, tmp_path, gone, names):
    shutil.copytree(folders / "llava", tmp_path / "part")
    for name in gone:
        (tmp_path / "part" / name).unlink()
    message = fails("run", "--model", tmp_path / "part", "--image", folders / "0.png", "--method", "random")
    for name in names:
        assert name in message


def test_run_no_code_of_others(fails, folders, tmp_path):
    """A folder that brings code is not run without --trust-remote-code."""
    shutil.copytree(folders / "llava", tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "strange.py").write_text("raise SystemExit('this ran')")
    message = fails("run", "--model", tmp_path / "code", "--image", folders / "0.png", "--method", "random")
    assert "--trust-remote-code" in message


# -- explain --------------------------------------------------------------------------------------------------------


def test_explain_needs_no_weights(vtc_, folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders / "llava" / "config.json").read_bytes())
    code, text, err = vtc_("explain", "--model", tmp_path)
    assert code == 0, err
    for words in ("LlavaModel", "25 visual tokens", "KV cache", "Multiply-adds", "0.25:"):
        assert words in text, words
    code, text, _ = vtc_("explain", "--model", tmp_path, "--method", "tome", "--json")
    data = json.loads(text)
    assert code == 0 and data["ok"] and data["cost"]["visual"] == 25
    macs = data["cost"]["macs"]
    assert macs["1"] > macs["0.5"] > macs["0.25"] > macs["0.1"] > 0


def test_explain_says_why_not(vtc_, tmp_path):
    zoo.FAMILIES["gemma3"].config().save_pretrained(tmp_path / "gemma3")
    code, text, _ = vtc_("explain", "--model", tmp_path / "gemma3", "--method", "fastv")
    assert code == 1 and "windows" in text
    mllm_classes.CLASSES["minimax_m3_vl"].config().save_pretrained(tmp_path / "minimax")
    code, text, _ = vtc_("explain", "--model", tmp_path / "minimax", "--json")
    found = json.loads(text)
    assert code == 1 and "takes positions for numbers of columns" in found["text"] and found["cost"] is None


def test_explain_bad_input(fails, folders):
    assert "'tomme'" in fails("explain", "--model", folders / "llava", "--method", "tomme")
    assert "no such folder" in fails("explain", "--model", "./nowhere")
    assert "--download" in fails("explain", "--model", "nobody/nothing")


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name != "gemma3_sliding"])
def test_estimate_counts_what_the_model_makes(name):
    """The sample prompt of every family runs, and what a real call reports agrees with the estimate."""
    from vtc.adapters.multimodal.families.prompts import picture
    from vtc.bench.estimate import estimate
    from vtc.bench.prefill import cache_bytes
    from vtc.models.configs import sketch

    config, model = zoo.FAMILIES[name].config(), zoo.build(name)
    side = 64 if name.startswith("llava") else 80
    cost = estimate(config, sketch(config))
    sample = picture(config, side)
    inputs = sample.inputs(model)
    with vtc.compress(model, "random", keep=0.5) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
    newlines = sample.tokens - sum(handle.report.before)
    assert newlines == 0 or "llava_" in name and 0 < newlines < 20
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == sample.tokens
    assert cost.dtype == "bfloat16" and cache_bytes(out) == 2 * cost.kv_bytes * int(handle.kept.sum())
    assert cost.macs[1.0] > cost.macs[0.1] > 0


def test_positions_and_the_picture(vtc_, folders, tmp_path):
    """PPE from the command line: the report, the picture, and what makes no sense said in one line."""
    base = ["run", "--image", folders / "0.png", "--prompt", "what", "--max-new-tokens", 2, "--repeats", 1, "--json"]
    out = tmp_path / "groups.png"
    llava, qwen = ["--model", folders / "llava"], ["--model", folders / "qwen2_5_vl"]
    ppe = ["--method", "dpc_knn", "--keep", 0.4, "--positions", "ppe"]
    code, text, err = vtc_(*base, *qwen, *ppe, "--out", out)
    assert code == 0, err
    assert json.loads(text)["options"] == {"keep": 0.4, "positions": "ppe"}
    with Image.open(out) as picture:
        assert min(picture.size) > 400
    code, text, err = vtc_(*base, *llava, *ppe, "--slots", 4)
    assert code == 0 and json.loads(text)["options"]["positions"] == {"slots": 4}, err
    code, text, err = vtc_(*base, *llava, "--method", "tome+proportional")
    assert code == 0 and json.loads(text)["options"] == {"keep": 0.25, "proportional": True}, err
    for options, why in (
        ([*llava, "--method", "idpruner", "--positions", "ppe"], "drops tokens"),
        ([*llava, "--method", "dpc_knn", "--slots", 4], "add --positions ppe"),
        ([*qwen, *ppe, "--slots", 3], "choose one of 1, 2"),
        ([*llava, "--method", "dpc_knn+ppe", "--positions", "ppe"], "leave one of the two out"),
        ([*llava, "--method", "idpruner+proportional"], "merges nothing"),
        ([*llava, *ppe, "--out", tmp_path / "a.jpg"], "PNG"),
        (["--positions", "ppe"], "is for a multimodal LLM"),
    ):
        code, text, err = vtc_(*base, *options)
        assert code == 2 and not text and why in err and err.count("\n") == 1, err


def test_positions_in_explain(vtc_, fails, folders):
    qwen = ["explain", "--model", folders / "qwen2_5_vl"]
    code, text, _ = vtc_(*qwen, "--method", "dpc_knn", "--positions", "ppe")
    assert code == 0 and "up to 2 members (rotary sections [4, 2, 2])" in text
    code, text, _ = vtc_(*qwen, "--method", "dpc_knn", "--positions", "ppe", "--slots", 1)
    assert code == 0 and "up to 1 members" in text
    code, text, _ = vtc_(*qwen, "--method", "dpc_knn", "--positions", "ppe", "--slots", 3)
    assert code == 1 and "choose one of 1, 2" in text
    assert "drops tokens" in fails(*qwen, "--method", "idpruner", "--positions", "ppe")
    assert "add --method" in fails(*qwen, "--positions", "ppe")
    assert "add --positions ppe" in fails(*qwen, "--method", "dpc_knn", "--slots", 2)


def test_positions_in_bench(vtc_, fails, tmp_path):
    zoo.FAMILIES["llava"].config().save_pretrained(tmp_path)
    bench = ["bench", "--model", tmp_path, "--keep", 0.5, "--repeats", 1, "--warmup", 1, "--json"]
    code, text, err = vtc_(*bench, "--methods", "dpc_knn", "--positions", "ppe", "--slots", 4)
    assert code == 0, err
    assert json.loads(text)["positions"] == {"slots": 4}
    code, text, err = vtc_(*bench, "--methods", "tome", "tome+proportional", "tome+ppe")
    assert [row["method"] for row in json.loads(text)["rows"]] == ["tome", "tome+proportional", "tome+ppe"], err
    assert "drops tokens" in fails(*bench, "--methods", "dpc_knn,random", "--positions", "ppe")
    assert "add --positions ppe" in fails(*bench, "--methods", "dpc_knn", "--slots", 4)
    encoder = ["bench", "--model", "timm:test_vit", "--batch", 1, "--repeats", 1]
    assert "not rotary" in fails(*encoder, "--positions", "ppe")
