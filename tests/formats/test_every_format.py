"""Every format: told by its content, read from what its original writes, written for what its original reads."""

import base64
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from zips import bfloat16, make_zip, npy, rows_of

from kobold_sp_plugin import Catalogue, SoftPrompt, errors
from kobold_sp_plugin.formats import FORMATS, format_of, formats_table, load, read_header, save
from kobold_sp_plugin.softprompt import Order, Scale

ROWS = rows_of(20, 8)
META = {
    "name": "Noir é",
    "author": ["A", "B"],
    "supported": ["gpt-j-6b"],
    "description": "Rain.",
    "mood": {"dark": [1, None]},
    "kobold_sp_plugin": {"fingerprint": {"version": 9}},
}
WRITTEN = [each for each in FORMATS if each.write]
FULL = {each.name for each in FORMATS if each.holds == "everything"}


def path_of(folder, kind):
    return folder / ("noir" + (kind.extensions[0] if kind.extensions else ""))


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_what_is_written_is_read_again(tmp_path, kind):
    for dtype in kind.dtypes:
        path = path_of(tmp_path / dtype, kind)
        path.parent.mkdir()
        softprompt = SoftPrompt(ROWS, META, scale=kind.scale, order="after_bos" if kind.name in FULL else None)
        save(softprompt, path, dtype, kind.name)
        header, read = read_header(path), load(path)
        assert format_of(path) is kind
        assert (header.format, header.dtype, header.n_tokens, header.width) == (kind.name, dtype, 20, 8)
        assert (read.scale, header.scale) == (kind.scale, kind.scale)
        assert np.array_equal(read.rows, ROWS)
        assert header.metadata == read.metadata
        if kind.name in FULL:
            assert (read.order, header.order) == (Order.AFTER_BOS, Order.AFTER_BOS)
            assert {key: read.metadata[key] for key in META if key != "kobold_sp_plugin"} == {
                key: value for key, value in META.items() if key != "kobold_sp_plugin"
            }
            assert read.metadata["kobold_sp_plugin"]["fingerprint"] == {"version": 9}


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_the_same_content_gives_the_same_bytes(tmp_path, kind):
    softprompt = SoftPrompt(ROWS, META, scale=kind.scale)
    contents = []
    for name in "ab":
        path = tmp_path / name
        save(softprompt, path, kind.dtypes[0], kind.name)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_what_cannot_be_written_is_refused(tmp_path, kind):
    other = Scale.MODULE if kind.scale is Scale.MATRIX else Scale.MATRIX
    softprompt = SoftPrompt(ROWS, scale=other)
    if kind.write is None:
        with pytest.raises(errors.NotWritable, match="expected another format"):
            save(softprompt, tmp_path / "a", format=kind.name)
    elif kind.declares_scale:
        save(softprompt, tmp_path / "a", format=kind.name)
        assert load(tmp_path / "a").scale is read_header(tmp_path / "a").scale is other
        return
    else:
        with pytest.raises(errors.UnknownScale) as caught:
            save(softprompt, tmp_path / "a", kind.dtypes[0], kind.name)
        assert caught.value.path == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_only_twenty_rows_can_be_uploaded(tmp_path):
    with pytest.raises(errors.NotWritable, match="reads 20"):
        save(SoftPrompt(rows_of(19), scale="module"), tmp_path / "a", "float16", "upload")


def test_a_failed_write_of_a_folder_leaves_nothing(tmp_path):
    huge = SoftPrompt(ROWS, {"description": "x" * 70000}, scale="module")
    with pytest.raises(errors.MetadataTooLarge):
        save(huge, tmp_path / "a", format="peft")
    with pytest.raises(errors.NotFinite):
        save(SoftPrompt(ROWS * 1e6 + 7e4, scale="module"), tmp_path / "a", "float16", "peft")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_keeps_what_else_it_holds(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("mine")
    for name in ("One", "Two"):
        save(SoftPrompt(ROWS, {"name": name}, scale="module"), tmp_path / "a", format="peft")
    assert load(tmp_path / "a").name == "Two"
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    assert len(list((tmp_path / "a").iterdir())) == 3


# torch


def torch_saved():
    """Name → what is saved, and the rows in it."""
    rows = torch.tensor(ROWS)
    return {
        "tensor": (rows, rows),
        "parameter": (torch.nn.Parameter(rows), rows),
        "half": (rows.half(), rows),
        "bfloat16": (rows.bfloat16(), rows),
        "double": (rows.double(), rows),
        "[1, n, d]": (rows[None], rows),
        "transposed": (rows.t().contiguous().t(), rows),
        "a view": (torch.cat([rows, rows])[20:], rows),
        "every other column": (rows.repeat_interleave(2, 1)[:, ::2], rows),
        "one row expanded": (rows[:1].expand(20, 8), rows[:1].expand(20, 8)),
        "one row": (rows[:1], rows[:1]),
        "one column of many": (rows[:, 3:4], rows[:, 3:4]),
        "by its name": ({"prompt_embeddings": rows, "bias": torch.zeros(2, 3), "step": torch.tensor(3)}, rows),
        "the only matrix": ({"x": rows, "y": torch.zeros(5)}, rows),
        "of a module": ({"soft.learned_embedding": rows, "wte": torch.zeros(5, 8)}, rows),
        "with a scalar of NumPy": ({"x": rows, "loss": np.float32(2)}, rows),
    }


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", torch_saved())
def test_what_torch_saves(tmp_path, kind, is_zip):
    saved, rows = torch_saved()[kind]
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert np.array_equal(load(tmp_path / "a.pt").rows, rows.numpy())
    assert read_header(tmp_path / "a.pt").format == "pt"
    dtype = {"half": "float16", "bfloat16": "bfloat16", "double": "float64"}.get(kind, "float32")
    assert read_header(tmp_path / "a.pt").dtype == dtype


def test_one_of_several_tensors_is_chosen_by_its_name(tmp_path):
    saved = {"good": torch.tensor(ROWS), "bad": torch.zeros(3, 8)}
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(errors.SeveralSoftPrompts, match="good, bad"):
        load(tmp_path / "a.pt")
    assert np.array_equal(load(tmp_path / "a.pt", "good").rows, ROWS)
    with pytest.raises(errors.NoTensor, match="it holds good, bad"):
        load(tmp_path / "a.pt", "ugly")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_reads_what_is_written(tmp_path, dtype):
    save(SoftPrompt(ROWS), tmp_path / "a.pt", dtype, "pt")
    save(SoftPrompt(ROWS, scale="module"), tmp_path / "a.b64", dtype, "vllm")
    save(SoftPrompt(ROWS), tmp_path / "a.json", dtype, "mkultra")
    embeds = torch.load(io.BytesIO(base64.b64decode((tmp_path / "a.b64").read_bytes(), validate=True)))
    text = json.loads((tmp_path / "a.json").read_text())
    for tensor in (torch.load(tmp_path / "a.pt"), embeds, pickle.loads(base64.b64decode(text["tensor"]))):
        assert tensor.dtype == getattr(torch, dtype)
        assert np.array_equal(tensor.float().numpy(), ROWS)
        assert not tensor.requires_grad
        tensor += 1  # its memory is its own


def on_a_gpu(data):
    """A pickle of a tensor as it is when the tensor lay on a GPU."""
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    grown = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    size = data.index(b"B", data.index(b"_load_from_bytes")) + 1
    return grown[:size] + struct.pack("<I", struct.unpack_from("<I", data, size)[0] + 3) + grown[size + 4 :]


@pytest.mark.parametrize("shape", [(20, 8), (1, 20, 8)])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("gpu", [False, True])
def test_mkultra_as_others_write_it(tmp_path, shape, protocol, gpu):
    pickled = pickle.dumps(torch.nn.Parameter(torch.tensor(ROWS).reshape(shape)).detach(), protocol=protocol)
    if gpu and protocol == 4:
        pickled = on_a_gpu(pickled)
    meta = {"name": "Emma", "uuid": "u", "description": "d", "epoch": 1.5, "step": 3}
    if protocol == 2:  # where bytes have no instruction of their own
        pickled = pickle.dumps(torch.tensor(ROWS).reshape(shape), protocol=3)
    (tmp_path / "a.json").write_text(json.dumps({"metadata": meta, "tensor": base64.b64encode(pickled).decode()}))
    assert np.array_equal(load(tmp_path / "a.json").rows, ROWS)
    assert dict(read_header(tmp_path / "a.json").metadata) == meta


def test_json_of_any_style(tmp_path):
    tensor = base64.encodebytes(pickle.dumps(torch.tensor(ROWS), protocol=4)).decode()
    text = json.dumps({"tensor": tensor, "metadata": {"name": "N"}}, indent=4).replace("/", "\\/")
    (tmp_path / "a.txt").write_text("\ufeff \n" + text, encoding="utf-8")
    assert np.array_equal(load(tmp_path / "a.txt").rows, ROWS)
    assert load(tmp_path / "a.txt").name == "N"


def test_mtj_softtuners_checkpoint(tmp_path):
    for rows, dtype in ((ROWS, "float32"), (bfloat16(ROWS).view("V2"), "bfloat16")):
        with open(tmp_path / "a.mtjsp", "wb") as file:
            np.savez_compressed(
                file, tensor=rows, opt_state=np.array([{"a": 1}, print], dtype=object), step=np.uint32(300),
                loss=np.float32(2.5), last_loss=np.float32(np.nan), grad_norm=np.float32(1),
            )  # fmt: skip
        header = read_header(tmp_path / "a.mtjsp")
        assert (header.format, header.dtype) == ("mtjsp", dtype)
        assert dict(header.metadata) == {"step": 300, "loss": 2.5, "grad_norm": 1.0}
        assert np.array_equal(load(tmp_path / "a.mtjsp").rows, ROWS)


def test_koboldais_checkpoint(tmp_path):
    parameter = torch.nn.Parameter(torch.tensor(ROWS))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {
        "tensor": parameter,
        "opt_state": optimizer.state_dict(),
        "step": 7,
        "loss": 2.5,
        "grad_norm": np.float64(1),
    }
    torch.save(state, tmp_path / "a.mtjsp")
    assert read_header(tmp_path / "a.mtjsp").format == "mkusp"
    assert dict(read_header(tmp_path / "a.mtjsp").metadata) == {"step": 7, "loss": 2.5}
    assert np.array_equal(load(tmp_path / "a.mtjsp").rows, parameter.detach().numpy())


def test_exelents_folder(tmp_path):
    three = np.stack([ROWS, ROWS + 1, ROWS + 2])
    torch.save({"s_wte.learned_embedding": torch.tensor(three)}, tmp_path / "pytorch_weights.bin")
    (tmp_path / "config.json").write_text('{"_name_or_path": "gpt-j", "soft_emb_n_prompts": 3}')
    with pytest.raises(errors.SeveralSoftPrompts, match="3 soft prompts"):
        load(tmp_path)
    for number in range(3):
        assert np.array_equal(load(tmp_path, str(number)).rows, ROWS + number)
    for part in ("3", "-1", "one", "9" * 9):
        with pytest.raises(errors.NoTensor):
            load(tmp_path, part)
    assert load(tmp_path, "0").supported == ["gpt-j"]
    save(SoftPrompt(ROWS, scale="module"), tmp_path / "b", format="exelents")
    saved = torch.load(tmp_path / "b" / "pytorch_weights.bin")
    assert np.array_equal(saved["s_wte.learned_embedding"].numpy(), ROWS[None])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["soft_emb_n_prompts"], config["soft_emb_n_tokens"]) == (1, 20)


def test_googles_checkpoints(tmp_path):
    for step in (5, 100, 20):
        folder = tmp_path / "numpy_checkpoints" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        (folder / "target.encoder.prompt.prompt.prompt").write_bytes(npy(ROWS + step))
    (tmp_path / "numpy_checkpoints" / "checkpoint_999.tmp-1").mkdir()
    for path in (tmp_path, tmp_path / "numpy_checkpoints", tmp_path / "numpy_checkpoints" / "checkpoint_100"):
        assert np.array_equal(load(path).rows, ROWS + 100)
        assert dict(read_header(path).metadata) == {"parameter": "target.encoder.prompt.prompt.prompt", "step": 100}
    assert np.array_equal(load(tmp_path / "numpy_checkpoints" / "checkpoint_5").rows, ROWS + 5)
    newest = tmp_path / "numpy_checkpoints" / "checkpoint_100"
    (newest / "bias").write_bytes(npy(np.zeros(3, "f4")))
    assert np.array_equal(load(tmp_path).rows, ROWS + 100)
    (newest / "other.prompt").write_bytes(npy(ROWS))
    with pytest.raises(errors.SeveralSoftPrompts, match=r"other\.prompt"):
        load(tmp_path)
    assert np.array_equal(load(tmp_path, "other.prompt").rows, ROWS)
    with pytest.raises(errors.NoTensor):
        load(tmp_path, "none")


def test_uploads(tmp_path):
    data = base64.b64encode(zlib.compress(ROWS.astype("f2").tobytes())).decode()
    text = {"name": "N", "description": "d", "public": False, "model": "gpt-j", "loss": 2.0, "steps": 9, "data": data}
    (tmp_path / "a.json").write_text(json.dumps(text))
    assert np.array_equal(load(tmp_path / "a.json").rows, ROWS)
    assert load(tmp_path / "a.json").supported == ["gpt-j"]
    save(load(tmp_path / "a.json"), tmp_path / "b.json", "float16", "upload")
    again = json.loads((tmp_path / "b.json").read_text())
    assert {key: again[key] for key in text if key != "data"} == {key: text[key] for key in text if key != "data"}
    tensor = np.frombuffer(zlib.decompress(base64.b64decode(again["data"])), np.float16)
    assert np.array_equal(tensor.reshape(20, len(tensor) // 20), ROWS)


def test_safetensors_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        library.save_file({"rows": torch.tensor(ROWS).to(dtype), "b": torch.zeros(3)}, tmp_path / "a", {"name": "N"})
        assert np.array_equal(load(tmp_path / "a").rows, ROWS)
        assert dict(load(tmp_path / "a").metadata) == {"name": "N"}
    for dtype in ("float32", "float16", "bfloat16"):
        save(SoftPrompt(ROWS, META), tmp_path / "b", dtype, "safetensors")
        (tensor,) = library.load_file(tmp_path / "b").values()
        assert np.array_equal(tensor.float().numpy(), ROWS)
        assert tensor.dtype == getattr(torch, dtype)


def test_old_and_foreign_adapters(tmp_path):
    config = {"peft_type": "P_TUNING", "base_model_name_or_path": "gpt2", "num_virtual_tokens": 20, "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.NoTensor, match=r"adapter_model\.safetensors"):
        load(tmp_path)
    torch.save({"prompt_embeddings": torch.tensor(ROWS), "other": torch.tensor(ROWS)}, tmp_path / "adapter_model.bin")
    assert np.array_equal(load(tmp_path).rows, ROWS)
    assert (load(tmp_path).scale, load(tmp_path).supported) == (Scale.MODULE, ["gpt2"])
    save(load(tmp_path), tmp_path / "b", format="peft")
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["base_model_name_or_path"]) == ("P_TUNING", "gpt2")
    for method in ("PREFIX_TUNING", "LORA", "MULTITASK_PROMPT_TUNING", "CPT", None, ["x"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
        with pytest.raises(errors.UnsupportedMethod, match="expected prompt tuning or p-tuning"):
            read_header(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_transformer_submodules": 2}))
    with pytest.raises(errors.UnsupportedMethod, match="encoder"):
        read_header(tmp_path)


def test_links_of_a_hugging_face_cache_are_followed_and_others_are_not(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save(SoftPrompt(ROWS, scale="module"), tmp_path / "adapter", format="peft")
    for file in (tmp_path / "adapter").iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert np.array_equal(load(snapshot).rows, ROWS)
    snapshot.rename(tmp_path / "elsewhere")
    with pytest.raises(errors.UnsafeName, match="a link out of its folder"):
        load(tmp_path / "elsewhere")


def test_a_novelai_module_is_called_what_it_is(tmp_path):
    for content in (b"", b"{}", b"\x00\x01\x02"):
        (tmp_path / "a.module").write_bytes(content)
        with pytest.raises(errors.UnsupportedMethod, match="NovelAI"):
            read_header(tmp_path / "a.module")
    save(SoftPrompt(ROWS), tmp_path / "a.module")
    assert format_of(tmp_path / "a.module").name == "zip"  # content counts


def test_metadata_that_is_no_object_is_kept_on_rewriting(tmp_path):
    for meta in ([1, {"a": [2]}], "text", 7):
        (tmp_path / "a.zip").write_bytes(make_zip(("tensor.npy", npy(ROWS)), ("meta.json", json.dumps(meta).encode())))
        load(tmp_path / "a.zip").save(tmp_path / "b.zip")
        assert load(tmp_path / "b.zip").metadata["kobold_sp_plugin"]["original"] == meta
    odd = {"name": ["A", "B"], "description": {"en": "x"}}
    (tmp_path / "a.zip").write_bytes(make_zip(("tensor.npy", npy(ROWS)), ("meta.json", json.dumps(odd).encode())))
    load(tmp_path / "a.zip").save(tmp_path / "b.zip")
    load(tmp_path / "b.zip").save(tmp_path / "c.zip")
    assert load(tmp_path / "c.zip").metadata["kobold_sp_plugin"]["original"] == odd


def test_a_catalogue_lists_them_all(tmp_path):
    for kind in WRITTEN:
        save(SoftPrompt(ROWS, {"name": kind.name}, scale=kind.scale), path_of(tmp_path, kind).with_name(
            kind.name + (kind.extensions[0] if kind.extensions else "")), kind.dtypes[0], kind.name)  # fmt: skip
    checkpoint = tmp_path / "google" / "numpy_checkpoints" / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "prompt").write_bytes(npy(ROWS))
    (tmp_path / "nai.module").write_bytes(b"?")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").write_text('{"not": "meant"}')
    catalogue = Catalogue(tmp_path)
    entries = {entry.filename: entry for entry in catalogue.entries()}
    assert len(entries) == len(WRITTEN) + 2
    assert "NovelAI" in entries.pop("nai.module").reason
    assert {entry.n_tokens for entry in entries.values()} == {20}
    for filename in entries:
        assert np.array_equal(catalogue.load(filename).rows, ROWS)
    newer = checkpoint.with_name("checkpoint_2")
    newer.mkdir()
    (newer / "prompt").write_bytes(npy(rows_of(5, 8)))
    assert catalogue.entry("google").n_tokens == 5
    save(SoftPrompt(ROWS[:7], scale="module"), tmp_path / "peft", format="peft")
    assert catalogue.entry("peft").n_tokens == 7


def test_the_table_names_every_format():
    for kind in FORMATS:
        assert f"| {kind.name} | {kind.sentence} |" in formats_table()
