"""What vtc.vllm says before vLLM is there: settings, refusals, and the decision on a tower's rows."""

import json
import os
import subprocess
import sys

import pytest
import torch

import vtc
import vtc.vllm
from vtc.errors import InputError, OptionError, UnsupportedModelError
from vtc.methods import METHODS, make
from vtc.vllm import decide, plugin
from vtc.vllm.evidence import READ
from vtc.vllm.settings import VARIABLE, Settings, configured, read


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (VARIABLE, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_setting_nothing_is_done():
    """Not even vLLM is looked for."""
    assert configured() is None
    code = "import sys, vtc.vllm; vtc.vllm.register(); sys.exit('vllm' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


@pytest.mark.parametrize(
    ("text", "method", "positions"),
    [
        ("divprune:keep=0.25", vtc.DivPrune(keep=0.25), "keep"),
        (" tome : keep=64 , positions=compact ", vtc.ToMe(keep=64), "compact"),
        ("random:keep=1,seed=3", vtc.Random(keep=1.0, seed=3), "keep"),
        ("idpruner:keep=.5,importance=norm,balance=0.25", None, "keep"),
        ('{"method": "tome", "keep": 1, "positions": "compact"}', vtc.ToMe(keep=1), "compact"),
    ],
)
def test_settings_are_read_and_written(text, method, positions):
    if method is None:
        method = vtc.IDPruner(keep=0.5, importance="norm", balance=0.25)
        text = text.replace("keep=.5", "keep=0.5")
    found = read(text)
    assert found == Settings(method, positions) == read(found.text())
    assert type(read(found.text()).method.keep) is type(method.keep)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("divprune", "VTC_VLLM: no budget given"),
        ("divprune:keep", "VTC_VLLM='divprune:keep': it takes METHOD:keep=0.25"),
        ("{", "VTC_VLLM='{': it takes METHOD:keep=0.25, or a JSON object"),
        ('{"keep": 0.5}', "it takes METHOD:keep=0.25, or a JSON object"),
        ("divprun:keep=0.5", "VTC_VLLM: unknown method 'divprun': did you mean 'divprune'"),
        ("divprune:keep=2.5", "keep=2.5: out of range"),
        ("divprune:ratio=0.5", "divprune has no option 'ratio' .use keep="),
        ("tome:keep=0.5,positions=ppe", "positions='ppe': vLLM gives a token one position on each axis"),
        ("tome:keep=0.5,positions=original", 'positions=\'original\': in vLLM it takes "keep" or "compact"'),
    ],
)
def test_a_wrong_setting_is_refused(text, says):
    with pytest.raises(OptionError, match=says):
        read(text)


REFUSED = {
    "fastv": "removes tokens between the decoder's layers, and vLLM's KV cache has one length for all of them",
    "dart": "between the decoder's layers",
    "cubist_merge": "works in vision encoders with windows alone",
    "cdpruner": "reads the question, and vLLM caches what it made of an image for every question",
    "zoo_prune": "which vLLM does not give",
    "mmtok": "reads the question, and vLLM caches what it made of an image for every question",
    "pixelprune": "vLLM runs it on whole images",
    **dict.fromkeys(("evs", "flashvid", "vidcom2"), "the frames of each video, which vLLM does not give"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_served_or_refused_with_the_reason(name):
    if name in REFUSED:
        with pytest.raises(OptionError, match=REFUSED[name]):
            Settings(make(name, keep=0.5 if METHODS[name].budgeted else 1.0))
    else:
        assert Settings(make(name, keep=0.5)).method.keep == 0.5


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (vtc.ToMe(keep=0.5, positions="ppe"), "gives a token several positions"),
        (vtc.ToMe(keep=0.5, cascade={2: 0.5}), "cascade= removes tokens between the decoder's layers"),
        (vtc.ToMe(keep=0.5, proportional=True), "proportional=True adds a bias"),
        (vtc.ToMe(keep=0.5, where="tower"), "reduces inside the vision tower"),
        (vtc.ToMe(keep=0.5, pooled=True), "lets images share a budget"),
        (vtc.ToMe(r=8), "r= and flops= are for the layers of an encoder"),
        (vtc.Downsample(keep=0.5, mode="resize"), "shrinks the image itself"),
        (vtc.DivPrune(keep=0.5, frame="rotary"), "reads the positions of the prompt"),
        (vtc.IDPruner(keep=0.5, importance="relevance"), "reads the question"),
    ],
)
def test_every_option_is_served_or_refused_with_the_reason(method, says):
    with pytest.raises(OptionError, match=f"vLLM cannot run {method.name} so: .*{says}"):
        Settings(method)


def test_a_request_gives_its_budget_alone():
    settings = Settings(vtc.DivPrune(keep=0.25), "compact")
    assert settings.of_request(None) is settings
    assert settings.of_request({"keep": 0.5}) == Settings(vtc.DivPrune(keep=0.5), "compact")
    assert settings.of_request({"keep": 1}).method.keep == 1.0  # JSON of other languages writes 1.0 so
    for given in ({}, 0.5, {"keep": 0.5, "positions": "keep"}, [("keep", 0.5)]):
        with pytest.raises(OptionError, match="a request gives its budget and nothing else"):
            settings.of_request(given)
    for keep in (0, -1, 1.5, "0.5", None, True):
        with pytest.raises(OptionError, match="vtc: (keep=|no budget)"):
            settings.of_request({"keep": keep})


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSED])
def test_the_number_that_is_announced_is_the_number_that_stays(name):
    """Images of several sizes at once; each is decided as if it were alone."""
    method = make(name, keep=0.5)
    grids = [(4, 6), (5, 5), (1, 9), (4, 6)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(h * w, 20, generator=generator) for h, w in grids]
    kept = [method.reached(k, grid) for k, grid in zip((7, 25, 3, 23), grids, strict=True)]
    heard = [
        {n: torch.rand(len(x), *[8] * (n == "keys"), generator=generator) for n in method.needs & READ} for x in images
    ]
    together = decide.reduce(method, images, kept, grids, 16, heard)
    assert [len(rows) for rows, _ in together] == [len(places) for _, places in together] == kept
    for image, k, grid, own, (rows, places) in zip(images, kept, grids, heard, together, strict=True):
        assert bool((places.diff() > 0).all()) and 0 <= int(places.min()) and int(places.max()) < len(image)
        alone, where = decide.reduce(method, [image], [k], [grid], 16, [own])[0]
        assert torch.equal(where, places)
        torch.testing.assert_close(alone, rows)
        if k == len(image):
            assert rows is image
        elif not method.merges:
            assert torch.equal(rows, image[places])
    wider = [torch.cat([image[:, :16], image[:, 16:] * 1e3], 1) for image in images]  # planes are not looked at
    for (_, one), (_, other) in zip(together, decide.reduce(method, wider, kept, grids, 16, heard), strict=True):
        assert torch.equal(one, other)


def test_an_image_that_fills_no_grid_and_rows_that_are_no_numbers_are_refused():
    with pytest.raises(OptionError, match="downsample needs every image to fill a grid"):
        vtc.Downsample(keep=0.5).reached(4, None)
    with pytest.raises(InputError, match="image tokens hold NaN"):
        decide.reduce(vtc.DivPrune(keep=0.5), [torch.full((4, 2), float("nan"))], [2], [None], 2)


def test_another_vllm_than_those_tested_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "divprune:keep=0.5")
    monkeypatch.setattr(plugin, "installed", lambda: "0.33.1")
    with pytest.raises(UnsupportedModelError, match="tested with vLLM 0.32.0, and this is 0.33.1: install one of"):
        vtc.vllm.register()


def test_enable_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(vtc.vllm, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="vLLM is not installed: pip install vllm"):
        vtc.vllm.enable("divprune", keep=0.5)
    monkeypatch.setattr(vtc.vllm, "find_spec", lambda name: object())
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UnsupportedModelError, match="VLLM_PLUGINS='other' keeps vtc out"):
        vtc.vllm.enable("divprune", keep=0.5)
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(vtc.vllm, "entry_points", lambda group: ())
    with pytest.raises(UnsupportedModelError, match="would not find vtc"):
        vtc.vllm.enable("divprune", keep=0.5)
    monkeypatch.undo()
    assert VARIABLE not in os.environ


def test_what_failed_to_be_enabled_is_not_left_behind(monkeypatch):
    def fails():
        raise UnsupportedModelError("no")

    monkeypatch.setattr(vtc.vllm, "find_spec", lambda name: object())
    point = type("Point", (), {"name": "vtc"})
    monkeypatch.setattr(vtc.vllm, "entry_points", lambda group: (point,))
    monkeypatch.setattr(vtc.vllm, "register", fails)
    monkeypatch.setenv(VARIABLE, json.dumps({"method": "random", "keep": 0.5}))
    with pytest.raises(UnsupportedModelError):
        vtc.vllm.enable("divprune", keep=0.5)
    assert configured() == Settings(vtc.Random(keep=0.5))


def test_bench_serve_takes_what_vllm_takes_and_refuses_what_makes_no_sense(capsys):
    from vtc import cli
    from vtc.bench.served import Load

    for given in ({"rounds": 0}, {"concurrency": ()}, {"size": (0, 448)}):
        with pytest.raises(OptionError, match="has to be at least 1"):
            Load(**given)
    asked = ["bench", "serve", "MODEL", "--keep", "0.25", "--max-model-len", "64", "--method"]
    assert cli.main([*asked, "fastv"]) == 2
    assert "fastv removes tokens between the decoder's layers" in capsys.readouterr().err
    assert cli.main(["bench", "--enforce-eager"]) == 2  # vLLM's alone
    assert "unrecognized arguments: --enforce-eager" in capsys.readouterr().err
