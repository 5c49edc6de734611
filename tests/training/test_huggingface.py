import numpy as np
import pytest
import torch
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, attach, errors
from kobold_sp_plugin.softprompt import Order
from kobold_sp_plugin.training.huggingface import TrainableSoftPrompt

pytest.importorskip("accelerate")
load_file = pytest.importorskip("safetensors.numpy").load_file
transformers = pytest.importorskip("transformers", "4.57")

TEXTS = [f"The door opened and the rain came in. Nobody said a word; {word}." for word in "abcdefghijklmnop"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def trainer(model, tokenizer, folder, steps=6, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.3,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[dict(tokenizer(text)) for text in TEXTS],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def test_trainer_trains_the_rows_and_saves_nothing_else(tokenizer, tmp_path):
    base = tiny_model(FAMILY)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = TrainableSoftPrompt(base, tokenizer, n_tokens=4, initial_text="rain")
    first = model.softprompt()
    result = trainer(model, tokenizer, tmp_path, steps=30).train()
    assert result.training_loss > 0
    assert not np.allclose(first.rows, model.softprompt().rows)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    (weights,) = (tmp_path / "checkpoint-30").glob("*.safetensors")
    assert {name: array.shape for name, array in load_file(weights).items()} == {"soft_rows": (4, 32)}


def test_trainer_lowers_the_loss_that_attach_serves(tokenizer, tmp_path):
    model = TrainableSoftPrompt(tiny_model(FAMILY), tokenizer, n_tokens=4)
    losses = [served(model, tokenizer)]
    trainer(model, tokenizer, tmp_path, steps=30).train()
    losses.append(served(model, tokenizer))
    assert losses[1] < losses[0]


def served(model, tokenizer):
    """The loss of the first text with the soft prompt as hosts give it to the model."""
    base = model._base[0]
    handle = attach(base)
    handle.select(model.softprompt())
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = base(**handle.prepend(ids)).logits[0]
    handle.detach()
    wanted = ids[0, 1:]
    return float(torch.nn.functional.cross_entropy(logits[-len(wanted) - 1 : -1], wanted))


@pytest.mark.parametrize("order", list(Order))
def test_the_loss_is_the_one_that_is_served_whatever_the_padding(tokenizer, order):
    base = tiny_model(FAMILY)
    model = TrainableSoftPrompt(base, tokenizer, n_tokens=4, order=order)
    batch = tokenizer(["The rain came in.", TEXTS[0]], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    labels[:, 0] = -100
    found = model(batch.input_ids, batch.attention_mask, labels)["loss"]
    handle = attach(base)
    handle.select(model.softprompt())
    total = count = 0.0
    for text in ("The rain came in.", TEXTS[0]):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = base(**handle.prepend(ids)).logits[0]
        wanted = ids[0, 1:]
        total += float(torch.nn.functional.cross_entropy(logits[-len(wanted) - 1 : -1], wanted, reduction="sum"))
        count += len(wanted)
    handle.detach()
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-4)


def test_it_resumes_from_trainers_checkpoint(tokenizer, tmp_path):
    whole = TrainableSoftPrompt(tiny_model(FAMILY), tokenizer, n_tokens=4)
    trainer(whole, tokenizer, tmp_path).train()
    again = TrainableSoftPrompt(tiny_model(FAMILY), tokenizer, n_tokens=4)
    trainer(again, tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.softprompt().rows.tobytes() == whole.softprompt().rows.tobytes()


def test_what_cannot_be_is_refused(tokenizer):
    base = tiny_model(FAMILY)
    with pytest.raises(errors.BadSetting, match="n_tokens"):
        TrainableSoftPrompt(base, tokenizer, n_tokens=0)
    with pytest.raises(errors.BadSetting, match="tokenizer"):
        TrainableSoftPrompt(base, initial_text="rain")
    with pytest.raises(errors.WidthMismatch):
        TrainableSoftPrompt(base, start_from=SoftPrompt(np.ones((2, 64), np.float32)))
    ids = torch.tensor([[0, 1, 5, 6]])
    with pytest.raises(errors.UnsupportedCall, match="padding_side"):
        TrainableSoftPrompt(base)(ids, (ids > 0).long(), ids)
