"""Checkpoints of others: what is taken from them, what is refused, and that no pickled code runs."""

from __future__ import annotations

import argparse
import enum
import json
import os
import pickle
import subprocess
import warnings
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hydradeploy import import_checkpoint
from hydradeploy.errors import HydraError, InputError, IntegrityError
from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD
from hydradeploy.supernet.store import load
from tests.conftest import geometry, supernet

KINDS = ("zip", "legacy", "safetensors", "pickle")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Colour(enum.Enum):
    """A class of the training script's own."""

    RED = 1


class Settings:
    """An object of the training script's own, with state."""

    def __init__(self):
        self.path, self.names = Path("/data"), ["a"]


def state(shape=None, seed=0, prefix=""):
    """A state dict of random weights."""
    return OrderedDict((prefix + name, tensor) for name, tensor in supernet(shape, seed).state_dict().items())


def official(**changes):
    """What the official training script saves, with classes of its own inside."""
    args = argparse.Namespace(
        heads=[2, 4, 6], model="hydra", data_dir=Path("/data/imagenet"), colour=Colour.RED, extra=Settings(), lr=1e-3
    )
    content = {
        "epoch": 299,
        "arch": "hydra",
        "state_dict": state(seed=1, prefix="module."),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "version": 2,
        "args": args,
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": state(seed=2),
        "metric": 78.4,
    }
    return content | changes


def write(path, content, zipped=True):
    """A checkpoint file in torch's format or its old one."""
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def imported(path, content, zipped=True, **options):
    """Import content by way of a file; the answer and what the supernet file then holds."""
    answer = import_checkpoint(write(path / "c.pth", content, zipped), path / "out", **({"head_dim": 8} | options))
    return answer, load(path / "out")


def same(loaded, seed):
    """Whether loaded weights are those of a seed."""
    return all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state(seed=seed).items())


def test_an_official_checkpoint_gives_its_averaged_weights_and_trained_heads(tmp_path):
    answer, loaded = imported(tmp_path, official())
    assert answer.entry == "state_dict_ema"
    assert answer.warnings == ()
    assert answer.spec == loaded.spec
    assert loaded.spec.geometry == geometry(trained_heads=(2, 4, 6))
    assert same(loaded, seed=2)


@pytest.mark.parametrize("empty", [{}, OrderedDict(), None])
def test_without_averaged_weights_the_others_are_taken_less_their_module_prefix(tmp_path, empty):
    answer, loaded = imported(tmp_path, official(state_dict_ema=empty))
    assert answer.entry == "state_dict"
    assert loaded.spec.geometry.trained_heads == (2, 4, 6)
    assert same(loaded, seed=1)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_averaged_weights_may_have_the_prefixes_of_processes_and_of_torch_compile(tmp_path, prefix):
    _, loaded = imported(tmp_path, official(state_dict_ema=state(seed=3, prefix=prefix)))
    assert same(loaded, seed=3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_safetensors_file_may_have_those_prefixes_too(tmp_path, prefix):
    save_file({f"{prefix}{name}": tensor for name, tensor in state().items()}, tmp_path / "c.safetensors")
    import_checkpoint(tmp_path / "c.safetensors", tmp_path / "out", head_dim=8)
    assert same(load(tmp_path / "out"), seed=0)


@pytest.mark.parametrize("heads", [[6, 2, 4, 4], [4, 2, 6]])
def test_heads_of_the_arguments_are_taken_in_any_order(tmp_path, heads):
    _, loaded = imported(tmp_path, official(args=argparse.Namespace(heads=heads)))
    assert loaded.spec.geometry.trained_heads == (2, 4, 6)


@pytest.mark.parametrize("heads", [None, [], "2,4", 6, [2, "4"], [True, 2], {"a": 1}])
def test_arguments_that_name_no_list_of_heads_are_as_good_as_none(tmp_path, heads):
    answer, loaded = imported(tmp_path, official(args=argparse.Namespace(heads=heads)))
    assert loaded.spec.geometry.trained_heads == (3, 4, 5, 6)
    assert "--trained-heads" in answer.warnings[0]


def test_heads_of_the_arguments_that_the_network_does_not_have_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"trained_heads must be within 1\.\.6"):
        imported(tmp_path, official(args=argparse.Namespace(heads=[3, 12])))


def test_given_heads_win_over_those_of_the_arguments(tmp_path):
    answer, loaded = imported(tmp_path, official(), trained_heads=(3, 6))
    assert loaded.spec.geometry.trained_heads == (3, 6)
    assert answer.warnings == ()


@FORMATS
def test_deits_own_files_hold_the_weights_under_model(tmp_path, zipped):
    answer, loaded = imported(tmp_path, {"model": state()}, zipped)
    assert answer.entry == "model"
    assert same(loaded, seed=0)


@FORMATS
def test_a_bare_state_dict_is_taken_with_a_warning_that_heads_were_assumed(tmp_path, zipped):
    answer, loaded = imported(tmp_path, state(), zipped)
    assert answer.entry == "bare state dict"
    assert "assumed 3-6 heads of 8 dims" in answer.warnings[0]
    assert same(loaded, seed=0)


def test_a_safetensors_file_is_taken(tmp_path):
    save_file(dict(state()), tmp_path / "c.safetensors")
    answer = import_checkpoint(tmp_path / "c.safetensors", tmp_path / "out", head_dim=8)
    assert answer.entry == "safetensors"
    assert same(load(tmp_path / "out"), seed=0)


def test_an_old_official_checkpoint_without_foreign_classes_is_taken(tmp_path):
    content = official()
    del content["args"]
    _, loaded = imported(tmp_path, content, zipped=False)
    assert same(loaded, seed=2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_any_float_type_becomes_fp32(tmp_path, kind):
    tensors = {name: tensor.to(kind) for name, tensor in state().items()}
    _, loaded = imported(tmp_path, tensors)
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}
    assert all(torch.equal(loaded.tensors[name], tensor.float()) for name, tensor in tensors.items())


def test_a_smaller_network_than_three_heads_is_assumed_trained_whole(tmp_path):
    _, loaded = imported(tmp_path, state(geometry(heads=2, trained_heads=(2,))))
    assert loaded.spec.geometry.trained_heads == (2,)


def test_parameters_and_shared_tensors_are_taken(tmp_path):
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in state().items()}
    tensors["norm.weight"] = tensors["blocks.0.norm1.weight"]
    _, loaded = imported(tmp_path, tensors)
    assert torch.equal(loaded.tensors["norm.weight"], tensors["blocks.0.norm1.weight"])


@pytest.mark.parametrize(
    "extra",
    [
        *(np.float64(78.4), np.arange(3), Path("/a"), PurePosixPath("a"), Colour.RED, Settings(), slice(1, 2), {1, 2}),
        *(defaultdict(list, {1: [2]}), torch.optim.SGD, print, torch.device("cpu"), complex(1, 2), range(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_a_training_script_keeps_does_not_matter(tmp_path, extra):
    _, loaded = imported(tmp_path, official(metric=extra))
    assert loaded.spec.geometry.trained_heads == (2, 4, 6)
    assert same(loaded, seed=2)


def test_colour_images_are_assumed_normalised_as_imagenet(tmp_path):
    answer, _ = imported(tmp_path, state())
    assert answer.spec.preprocessing.mean == IMAGENET_MEAN
    assert answer.spec.preprocessing.std == IMAGENET_STD
    assert (answer.spec.preprocessing.crop_pct, answer.spec.preprocessing.interpolation) == (0.875, "bicubic")


def test_gray_images_are_assumed_normalised_around_a_half(tmp_path):
    answer, _ = imported(tmp_path, state(geometry(channels=1)))
    assert answer.spec.geometry.channels == 1
    assert (answer.spec.preprocessing.mean, answer.spec.preprocessing.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize("line", ["{}\n", "{}\r\n"])
def test_class_names_are_the_lines_of_the_file_and_nothing_else(cli, tmp_path, line):
    names = ["ant", "bee\u2028wasp", *(f"class {i}" for i in range(2, 10))]
    text = "".join(map(line.format, [*names, "", ""]))
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    options = ("--head-dim", 8, "--trained-heads", "2-6", "--class-names", tmp_path / "names.txt")
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    assert load(tmp_path / "out").spec.class_names == tuple(names)


def test_what_is_given_ends_up_in_the_spec(cli, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"Klasse {i} é" for i in range(10)) + "\n", encoding="utf-8")
    given_options = {
        "--mean": "0.1,0.2,0.3",
        "--std": "0.4,0.5,0.6",
        "--crop-pct": 1.0,
        "--interpolation": "lanczos",
        "--class-names": tmp_path / "names.txt",
        "--trained-heads": "2,4-6",
        "--head-dim": 8,
    }
    options = [word for pair in given_options.items() for word in pair]
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    found = load(tmp_path / "out").spec
    assert found.preprocessing.mean == (0.1, 0.2, 0.3)
    assert found.preprocessing.std == (0.4, 0.5, 0.6)
    assert (found.preprocessing.crop_pct, found.preprocessing.interpolation) == (1.0, "lanczos")
    assert found.class_names == tuple(f"Klasse {i} é" for i in range(10))
    assert found.geometry.trained_heads == (2, 4, 5, 6)
    assert ran.err == ""


@pytest.mark.parametrize(
    ("option", "value", "code", "said"),
    [
        ("--mean", "0.1,0.2", 2, "--mean"),
        ("--mean", "a,b,c", 2, "not a list of numbers"),
        ("--mean", "nan,0,0", 2, "--mean"),
        ("--std", "0,1,1", 2, "--std"),
        ("--std", "inf,1,1", 2, "--std"),
        ("--crop-pct", "0", 2, "--crop-pct must be above 0"),
        ("--crop-pct", "1.5", 2, "--crop-pct must be above 0"),
        ("--crop-pct", "nan", 2, "--crop-pct"),
        ("--crop-pct", "much", 2, "crop-pct"),
        ("--interpolation", "cubic", 2, "interpolation"),
        ("--trained-heads", "2-7", 2, "--trained-heads must be within 1..6"),
        ("--trained-heads", "two", 2, "head counts"),
        ("--head-dim", "0", 2, "head-dim"),
        ("--class-names", "absent.txt", 2, "absent.txt"),
        ("--class-names", "/dev/null", 2, "0 --class-names for 10 classes"),
        ("--class-names", "/", 11, "cannot be read"),
        ("--colour", "red", 2, "--colour"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_nothing_is_written(cli, tmp_path, option, value, code, said):
    checkpoint = write(tmp_path / "c.pth", state())
    ran = cli("import", checkpoint, "--out", tmp_path / "out", "--head-dim", 8, option, value)
    assert ran.code == code, ran.err
    assert said in ran.err.splitlines()[0]
    assert ran.out == ""
    assert os.listdir(tmp_path) == ["c.pth"]


def test_class_names_that_are_no_text_are_refused(cli, tmp_path):
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00")
    checkpoint = write(tmp_path / "c.pth", state())
    ran = cli("import", checkpoint, "--out", tmp_path / "out", "--head-dim", 8, "--class-names", tmp_path / "names")
    assert ran.code == 11
    assert str(tmp_path / "names") in ran.err


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def calls(marker):
    """Calls that would each leave the marker file."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "mknod": Call(os.mknod, str(marker)),
        "path": Call(Path.touch, marker),
        "mkdir": Call(os.mkdir, str(marker)),
        "numpy": Call(np.savetxt, str(marker), [1]),
        "torch": Call(torch.save, 1, str(marker)),
        "pickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
    }


def with_call(call, where):
    """A checkpoint with a call at a place."""
    if where == "args":
        return official(args=argparse.Namespace(heads=[2, 4, 6], extra=call))
    if where == "state":
        return official(state_dict_ema=state() | {"evil": call})
    if where == "key":
        return {"model": state(), "other": {1: call}}
    return call


@FORMATS
@pytest.mark.parametrize("name", list(calls("")))
def test_the_calls_below_do_run_where_pickled_code_may(tmp_path, name, zipped):
    marker = tmp_path / "marker"
    checkpoint = write(tmp_path / "c.pth", calls(marker)[name], zipped)
    assert not marker.exists()
    with suppress(Exception):
        torch.load(checkpoint, weights_only=False)
    assert marker.exists()


@FORMATS
@pytest.mark.parametrize("where", ["args", "state", "key", "top"])
@pytest.mark.parametrize("name", list(calls("")))
def test_code_in_a_checkpoint_never_runs(cli, tmp_path, name, where, zipped):
    marker = tmp_path / "marker"
    checkpoint = write(tmp_path / "c.pth", with_call(calls(marker)[name], where), zipped)
    ran = cli("import", checkpoint, "--out", tmp_path / "out", "--head-dim", 8)
    assert not marker.exists()
    assert ran.code in (0, 10, 11), ran.err
    if ran.code == 0:
        assert where in ("args", "key")
        assert set(load(tmp_path / "out").tensors) == set(state())
    else:
        assert str(checkpoint) in ran.err
        assert "Traceback" not in ran.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_something_else_is_refused_without_advice_to_run_it(cli, tmp_path, protocol):
    path = tmp_path / "c.pth"
    path.write_bytes(pickle.dumps([1, 2], protocol))
    ran = cli("import", path, "--out", tmp_path / "out")
    assert ran.code == 11
    assert f"{path}: not a torch checkpoint, or one with code in it, which is not run" in ran.err
    assert "weights_only" not in ran.err


def test_a_torchscript_archive_is_refused_without_advice_to_run_it(cli, tmp_path):
    path = tmp_path / "c.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and so are its files
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)  # type: ignore[no-untyped-call]
    ran = cli("import", path, "--out", tmp_path / "out")
    assert ran.code == 11
    assert f"{path}: a TorchScript archive" in ran.err
    assert "save the state dict as safetensors" in ran.err
    assert "weights_only" not in ran.err


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_that_runs_code_is_refused(cli, tmp_path, protocol):
    marker = tmp_path / "marker"
    path = tmp_path / "c.pth"
    path.write_bytes(pickle.dumps(calls(marker)["os.system"], protocol))
    ran = cli("import", path, "--out", tmp_path / "out")
    assert ran.code in (10, 11), ran.err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "name", "shapes"),
    [
        ({"dist_token": (1, 1, 48)}, "dist_token", ["(1, 1, 48)", "none"]),
        ({"dist_token": (1, 1, 48), "pos_embed": (1, 18, 48)}, "pos_embed", ["(1, 18, 48)", "(1, 17, 48)"]),
        ({"blocks.0.ls1.gamma": (48,)}, "blocks.0.ls1.gamma", ["(48,)", "none"]),
        ({"reg_token": (1, 4, 48)}, "reg_token", ["(1, 4, 48)", "none"]),
        ({"pos_embed": (1, 21, 48)}, "pos_embed", ["(1, 21, 48)", "(1, 17, 48)"]),
        ({"pos_embed": (1, 26, 40)}, "pos_embed", ["(1, 26, 40)", "(1, 26, 48)"]),
        ({"blocks.1.attn.qkv.weight": (48, 144)}, "blocks.1.attn.qkv.weight", ["(48, 144)", "(144, 48)"]),
        ({"blocks.0.mlp.fc2.bias": (47,)}, "blocks.0.mlp.fc2.bias", ["(47,)", "(48,)"]),
        ({"head.bias": (9,)}, "head.bias", ["(9,)", "(10,)"]),
        ({"patch_embed.proj.weight": (48, 3, 8, 4)}, "patch_embed.proj.weight", ["(48, 3, 8, 4)"]),
        ({"blocks.5.norm1.weight": (48,)}, "blocks.2.norm1.weight", ["(48,)"]),
        ({"cls_token": None}, "cls_token", ["(1, 1, 48)"]),
        ({"blocks.1.norm2.bias": None}, "blocks.1.norm2.bias", ["(48,)"]),
        ({"pos_embed": (17, 48)}, "pos_embed", ["(17, 48)", "3"]),
        ({"patch_embed.proj.weight": (48, 192)}, "patch_embed.proj.weight", ["(48, 192)", "4"]),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_refused_with_its_name_and_both_shapes(cli, tmp_path, change, name, shapes):
    tensors = state()
    for changed, shape in change.items():
        if shape is None:
            del tensors[changed]
        else:
            tensors[changed] = torch.zeros(shape)
    ran = cli("import", write(tmp_path / "c.pth", tensors), "--out", tmp_path / "out", "--head-dim", 8)
    assert ran.code == 11, ran.err
    assert ran.err.startswith(f"error: {tmp_path / 'c.pth'}: tensor {name} ")
    assert all(shape in ran.err for shape in shapes), ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight"])
def test_a_checkpoint_that_is_no_vit_is_refused_with_the_missing_tensor_and_what_it_holds(cli, tmp_path, name):
    tensors = state()
    del tensors[name]
    ran = cli("import", write(tmp_path / "c.pth", tensors), "--out", tmp_path / "out", "--head-dim", 8)
    assert ran.code == 11
    assert f"tensor {name} is missing" in ran.err
    assert next(iter(tensors)) in ran.err


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_without_elements_is_refused(cli, tmp_path, name, axis):
    tensors = state()
    shape = list(tensors[name].shape)
    shape[axis] = 0
    tensors[name] = torch.zeros(shape)
    ran = cli("import", write(tmp_path / "c.pth", tensors), "--out", tmp_path / "out", "--head-dim", 8)
    assert ran.code == 11, ran.err


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(10, dtype=torch.int64),
        torch.ones(10, dtype=torch.complex64),
        torch.full((10,), float("nan")),
        torch.tensor([float("inf"), float("-inf")] * 5),
        torch.full((10,), 1e300, dtype=torch.float64),
        torch.ones(10, device="meta"),
        torch.ones(10).to_sparse(),
    ],
    ids=["int", "complex", "nan", "inf", "too large", "meta", "sparse"],
)
def test_a_tensor_of_no_use_is_refused_with_its_name(cli, tmp_path, tensor):
    checkpoint = write(tmp_path / "c.pth", state() | {"head.bias": tensor})
    ran = cli("import", checkpoint, "--out", tmp_path / "out", "--head-dim", 8)
    assert ran.code == 11, ran.err
    assert ran.err.startswith(f"error: {checkpoint}: tensor head.bias ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [{}, [], 3, None, "text", {"model": 3}, {"a": 1}, {1: torch.ones(1)}, [torch.ones(1)], torch.ones(2)]
)
def test_content_that_is_no_state_dict_is_refused(cli, tmp_path, content):
    ran = cli("import", write(tmp_path / "c.pth", content), "--out", tmp_path / "out")
    assert ran.code == 11, ran.err
    assert str(tmp_path / "c.pth") in ran.err


def test_an_embedding_that_is_no_multiple_of_the_head_size_is_refused_with_the_option_to_give(cli, tmp_path):
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "out")
    assert ran.code == 11
    assert "48" in ran.err
    assert "64" in ran.err
    assert "--head-dim" in ran.err


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint of a tiny network in each format."""
    path = tmp_path_factory.mktemp("checkpoints")
    tiny = state(geometry(head_dim=2, heads=2, trained_heads=(2,), depth=1, classes=2, image_size=8, patch_size=4))
    write(path / "zip", official(state_dict=tiny, state_dict_ema=tiny))
    write(path / "legacy", {"model": tiny}, zipped=False)
    save_file(dict(tiny), path / "safetensors")
    (path / "pickle").write_bytes(pickle.dumps({"model": {name: tensor.tolist() for name, tensor in tiny.items()}}))
    return path


def refused_cleanly(path, data):
    """Import bytes; they must be refused as damaged or as unfit, by the file's name."""
    path.write_bytes(data)
    with pytest.raises(HydraError) as refused:
        import_checkpoint(path, path.parent / "out", head_dim=2)
    assert isinstance(refused.value, IntegrityError | InputError)
    assert str(path) in refused.value.message
    assert refused.value.message.count("\n") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_checkpoint_is_refused_wherever_it_ends(tmp_path, checkpoints, kind):
    data = (checkpoints / kind).read_bytes()
    cuts = {*range(64), *range(0, len(data), max(1, len(data) // 120)), len(data) - 1}
    for cut in sorted(cuts):
        refused_cleanly(tmp_path / "c.pth", data[:cut])


def test_a_truncated_checkpoint_ends_the_command_with_exit_code_10(cli, tmp_path, checkpoints):
    (tmp_path / "c.pth").write_bytes((checkpoints / "zip").read_bytes()[:-100])
    ran = cli("import", tmp_path / "c.pth", "--out", tmp_path / "out", "--head-dim", 2)
    assert ran.code == 10
    assert "truncated" in ran.err
    assert "Traceback" not in ran.err


@settings(max_examples=100)
@given(st.binary(min_size=0, max_size=300))
def test_random_bytes_are_refused(tmp_path, data):
    refused_cleanly(tmp_path / "c.pth", data)


@settings(max_examples=100)
@given(st.binary(max_size=60), st.sampled_from((b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04", b"\x1a\0\0\0\0\0\0\0{")))
def test_random_bytes_that_begin_like_a_checkpoint_are_refused(tmp_path, data, start):
    refused_cleanly(tmp_path / "c.pth", start + data)


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.dictionaries(st.integers(0, 1500), st.integers(0, 255), min_size=1, max_size=3))
def test_a_checkpoint_with_damaged_bytes_is_imported_or_refused(tmp_path, checkpoints, kind, changes):
    damaged = bytearray((checkpoints / kind).read_bytes())
    for at, value in changes.items():
        damaged[at % len(damaged)] = value
    path = tmp_path / "c.pth"
    path.write_bytes(damaged)
    try:
        import_checkpoint(path, tmp_path / "out", head_dim=2, force=True)
    except (IntegrityError, InputError) as refused:
        assert str(path) in refused.message  # noqa: PT017
    else:
        assert load(tmp_path / "out").spec.geometry.depth >= 1


def test_a_zip_that_is_no_checkpoint_is_refused(cli, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    ran = cli("import", tmp_path / "c.pth", "--out", tmp_path / "out")
    assert ran.code == 10
    assert str(tmp_path / "c.pth") in ran.err


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
def test_a_pickle_of_something_else_is_said_to_be_that(cli, tmp_path, protocol):
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"model": {"head.bias": [0.5]}}, protocol=protocol))
    ran = cli("import", tmp_path / "c.pth", "--out", tmp_path / "out")
    assert ran.code == 11
    assert f"{tmp_path / 'c.pth'}: not a torch checkpoint, " in ran.err
    assert "save the state dict as safetensors" in ran.err


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x80\x02}"])
def test_what_is_no_pickle_is_said_to_be_that_and_not_what_the_loader_stumbled_over(cli, tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    ran = cli("import", tmp_path / "c.pth", "--out", tmp_path / "out")
    assert ran.code == 10
    assert "cannot be read (its bytes are no pickle, or only the beginning of one)" in ran.err


def test_a_checkpoint_whose_checksums_do_not_agree_is_imported_with_a_warning(cli, tmp_path):
    path = write(tmp_path / "c.pth", state())
    data = bytearray(path.read_bytes())
    at = data.find(state()["blocks.1.mlp.fc1.weight"].numpy().tobytes()) + 100
    data[at] ^= 1
    path.write_bytes(data)
    options = ("--out", tmp_path / "out", "--head-dim", 8, "--trained-heads", "2-6")
    ran = cli("import", path, *options)
    assert ran.code == 0
    assert "warning: the checksum of c/data/" in ran.err
    assert f"in {path} does not agree" in ran.err


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_no_such_file_is_a_usage_error(cli, tmp_path, name):
    ran = cli("import", tmp_path / name, "--out", tmp_path / "out")
    assert ran.code == 2
    assert str(tmp_path / name) in ran.err
    assert "hint:" in ran.err


def test_an_existing_file_is_replaced_only_when_told(cli, tmp_path):
    out = tmp_path / "out"
    out.write_text("precious")
    command = ("import", write(tmp_path / "c.pth", state()), "--out", out, "--head-dim", 8)
    ran = cli(*command)
    assert ran.code == 2
    assert "--force" in ran.err
    assert out.read_text() == "precious"
    assert cli(*command, "--force").code == 0
    assert same(load(out), seed=0)


@pytest.mark.parametrize("name", [".", "", "pipe"])
def test_what_is_no_file_is_not_replaced(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # as a device would be, which root could replace
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", name, "--head-dim", 8, "--force")
    assert ran.code == 2
    assert "name a file with --out" in ran.err
    assert Path("pipe").is_fifo()


def test_a_checkpoint_may_be_replaced_by_its_own_import(tmp_path):
    save_file(dict(state()), tmp_path / "c.safetensors")
    import_checkpoint(tmp_path / "c.safetensors", tmp_path / "c.safetensors", head_dim=8, force=True)
    assert same(load(tmp_path / "c.safetensors"), seed=0)


def test_a_refused_import_keeps_what_it_was_to_replace(tmp_path):
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(InputError):
        import_checkpoint(write(tmp_path / "c.pth", {"model": 3}), out, force=True)
    assert out.read_text() == "precious"


def test_a_supernet_file_is_refused_with_the_command_that_takes_it(cli, tmp_path, supernet_file):
    ran = cli("import", supernet_file, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "supernet file already" in ran.err
    assert f"hydradeploy export --supernet {supernet_file}" in ran.err


def test_an_import_that_cannot_write_ends_with_exit_code_12(cli, tmp_path):
    (tmp_path / "file").write_text("no directory")
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "file" / "out", "--head-dim", 8)
    assert ran.code == 12
    assert "Traceback" not in ran.err


def test_assumed_heads_are_a_warning_on_stderr_and_the_answer_stays_on_stdout(cli, tmp_path):
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "out", "--head-dim", 8)
    assert ran.code == 0
    assert ran.err.startswith("warning: ")
    assert len(ran.out.splitlines()) == 1
    assert "3-6 heads of 8, depth 2, 32x32 pixels in patches of 8, 10 classes" in ran.out


def test_known_heads_give_no_warning(cli, tmp_path):
    ran = cli("import", write(tmp_path / "c.pth", official()), "--out", tmp_path / "out", "--head-dim", 8)
    assert (ran.code, ran.err) == (0, "")


def test_json_is_one_document_and_nothing_else(cli, tmp_path):
    ran = cli("import", write(tmp_path / "c.pth", state()), "--out", tmp_path / "out", "--head-dim", 8, "--json")
    document = json.loads(ran.out)
    assert len(ran.out.splitlines()) == 1
    assert document["out"] == str(tmp_path / "out")
    assert document["entry"] == "bare state dict"
    assert document["spec"]["geometry"]["trained_heads"] == [3, 4, 5, 6]
    assert len(document["warnings"]) == 1


@pytest.mark.parametrize("content", [{"model": 3}, None])
def test_a_refused_import_prints_nothing_on_stdout_with_json(cli, tmp_path, content):
    ran = cli("import", write(tmp_path / "c.pth", content), "--out", tmp_path / "out", "--json")
    assert ran.code == 11
    assert ran.out == ""
