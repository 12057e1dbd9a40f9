"""The examples run, and show what they say they show."""

import json
import sys
from pathlib import Path

import pytest
from test_cli_mllm import folders  # noqa: F401

# peft asks transformers for a name that the newest one announces to take away
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demos"))


@pytest.mark.slow
def test_finetuning_with_ppe(tmp_path):
    """The loss falls from that of a guess among all words to about that of a guess among the four answers."""
    import finetune_ppe

    pytest.importorskip("peft")
    result = finetune_ppe.main(["--steps", "40", "--batch", "8", "--out", str(tmp_path / "adapter")])
    assert result["first"] > 3.5 and result["last"] < 2.0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_finetuning_a_model_of_your_own(folders, tmp_path):  # noqa: F811
    """--model and --data: the folder's model, the lines that `vtc.train` reads."""
    import finetune_ppe

    pytest.importorskip("peft")
    lines = [{"image": str(folders / f"{i}.png"), "prompt": "what is this ?", "answer": "this"} for i in (0, 1)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--model", str(folders / "qwen2_5_vl"), "--data", str(tmp_path / "data.jsonl"), "--steps", "12"]
    result = finetune_ppe.main([*given, "--keep", "0.4", "--out", str(tmp_path / "adapter")])
    assert result["last"] < result["first"] and "accuracy" not in result
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_finetuning_options_go_together(capsys):
    import finetune_ppe

    with pytest.raises(SystemExit):
        finetune_ppe.main(["--model", "somewhere"])
    assert "--model and --data go together" in capsys.readouterr().err
