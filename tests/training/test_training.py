import copy

import numpy as np
import pytest
import torch
from models import FAMILIES, FAMILY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, attach, errors
from kobold_sp_plugin.compatibility.matrix import matrix_of
from kobold_sp_plugin.softprompt import OWN_KEY, Order
from kobold_sp_plugin.training import Settings, Training, checkpoint, train
from kobold_sp_plugin.training.dataset import IGNORED, Dataset
from kobold_sp_plugin.training.initial import initial_rows
from kobold_sp_plugin.training.texts import Passage, documents, passages

TEXTS = [f"The door opened and the rain came in. Nobody said a word; {word}." for word in "abcdefghijklmnop"]
QUICK = Settings(n_tokens=4, steps=6, block=32, batch_tokens=200, evaluate_every=2, save_every=2, learning_rate=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def settings(**changes):
    return Settings(**{**{name: getattr(QUICK, name) for name in QUICK.__dataclass_fields__}, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", list(Order))
def test_the_loss_is_that_of_the_text_behind_the_soft_tokens(tokenizer, family, order, tmp_path):
    """What is trained is what is served: the soft tokens of `attach` give the same loss."""
    model = tiny_model(family)
    training = Training(model, tokenizer, TEXTS, settings(order=order), tmp_path)
    found = training.held_out_loss()
    training.close()
    handle = attach(model)
    handle.select(SoftPrompt(training.rows.rows, order=order))
    total, count = 0.0, 0
    for piece in training._held:
        ids = torch.tensor(training.dataset.batch([piece]).ids)
        inputs = handle.prepend(ids)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        length = ids.shape[1] - len(training.dataset.prefix)
        log = torch.log_softmax(logits[-length - 1 : -1], dim=-1)
        total -= float(log.gather(1, ids[0, -length:, None]).sum())
        count += length
    handle.detach()
    assert found == pytest.approx(total / count, rel=1e-4)


def test_training_lowers_the_held_out_loss_and_says_so(tokenizer):
    model = tiny_model(FAMILY)
    trained = train(model, tokenizer, TEXTS, settings(steps=40, patience=0))
    about = trained.metadata[OWN_KEY]["training"]
    assert about["held_out_after"] < 0.97 * about["held_out_before"]
    assert trained.n_tokens == 4
    assert trained.metadata[OWN_KEY]["fingerprint"]


def test_the_model_is_given_back_as_it_was(tokenizer):
    model = tiny_model(FAMILY)
    model.train()
    before = copy.deepcopy(model.state_dict())
    attributes = set(vars(model.get_input_embeddings()))
    train(model, tokenizer, TEXTS, QUICK)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training and set(vars(model.get_input_embeddings())) == attributes


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_training_resumes_to_the_same_rows(tokenizer, tmp_path, optimizer, stop):
    wanted = train(tiny_model(FAMILY), tokenizer, TEXTS, settings(optimizer=optimizer))

    class Interrupted(Exception):
        pass

    def interrupt(progress):
        if progress.step == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny_model(FAMILY), tokenizer, TEXTS, settings(optimizer=optimizer), tmp_path, on_progress=interrupt)
    steps = []
    resumed = train(
        tiny_model(FAMILY), tokenizer, TEXTS, settings(optimizer=optimizer), tmp_path, on_progress=steps.append
    )
    assert steps[0].step == stop + 1
    assert resumed.rows.tobytes() == wanted.rows.tobytes()
    assert resumed.metadata == wanted.metadata


def test_a_checkpoint_of_another_training_is_refused(tokenizer, tmp_path, monkeypatch):
    train(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)
    with pytest.raises(errors.CheckpointMismatch, match=r"learning_rate was 0\.1, is 0\.2"):
        train(tiny_model(FAMILY), tokenizer, TEXTS, settings(learning_rate=0.2), tmp_path)
    with pytest.raises(errors.CheckpointMismatch, match="data"):
        train(tiny_model(FAMILY), tokenizer, TEXTS[1:], QUICK, tmp_path)
    with monkeypatch.context() as other, pytest.raises(errors.CheckpointMismatch, match="another version"):
        other.setattr(checkpoint, "FORMAT", 1)
        train(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)
    (tmp_path / "checkpoint.npz").write_bytes(b"PK")
    with pytest.raises(errors.CheckpointMismatch, match="damaged"):
        train(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)


def test_it_goes_on_from_another_soft_prompt(tokenizer):
    model = tiny_model(FAMILY)
    first = train(model, tokenizer, TEXTS, settings(steps=20, patience=0))
    again = train(model, tokenizer, TEXTS, settings(steps=1), start_from=first)
    before = again.metadata[OWN_KEY]["training"]["held_out_before"]
    assert before == pytest.approx(first.metadata[OWN_KEY]["training"]["held_out_after"], rel=1e-5)
    with pytest.raises(errors.WidthMismatch, match="64 columns"):
        train(model, tokenizer, TEXTS, QUICK, start_from=SoftPrompt(np.ones((2, 64), np.float32)))


def test_of_several_soft_prompts_a_mixture_is_trained_with_its_weights(tokenizer, tmp_path):
    model = tiny_model(FAMILY)
    parts = [softprompt(seed, 4, 32) for seed in (0, 1)]
    mixed = train(model, tokenizer, TEXTS, settings(patience=0), tmp_path, parts)
    about = mixed.metadata[OWN_KEY]["training"]
    assert mixed.n_tokens == 4 and about["held_out_after"] < about["held_out_before"]
    assert sum(about["mixture"]) == pytest.approx(1) and about["mixture"][0] != pytest.approx(0.5)
    training = Training(model, tokenizer, TEXTS, settings(), tmp_path / "new", parts)
    training.close()
    assert np.allclose(training.rows.rows, (parts[0].rows + parts[1].rows) / 2, atol=1e-5)
    (tmp_path / "half").mkdir()
    steps = Training(model, tokenizer, TEXTS, settings(patience=0), tmp_path / "half", parts)
    for _, _ in zip(range(3), steps.run()):
        pass
    steps.close()
    again = train(model, tokenizer, TEXTS, settings(patience=0), tmp_path / "half", parts)
    assert again.rows.tobytes() == mixed.rows.tobytes()


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")  # torch 1.12 says so on a CPU
def test_gradient_checkpointing_and_accumulation_change_no_rows(tokenizer):
    plain = train(tiny_model(FAMILY), tokenizer, TEXTS, settings(batch_tokens=10**6, held_out=0.0, clip=0.0))
    halves = settings(batch_tokens=400, accumulate=1, held_out=0.0, clip=0.0, checkpoint_layers=True)
    whole = settings(batch_tokens=400, accumulate=1, held_out=0.0, clip=0.0)
    one, other = (train(tiny_model(FAMILY), tokenizer, TEXTS, each) for each in (halves, whole))
    assert np.allclose(one.rows, other.rows, atol=1e-6)
    assert not np.allclose(plain.rows, other.rows, atol=1e-6)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(tokenizer, tmp_path):
    kept = {}
    for checkpoint_layers in (False, True):
        model = tiny_model(FAMILY)
        training = Training(
            model, tokenizer, TEXTS, settings(checkpoint_layers=checkpoint_layers), tmp_path / str(checkpoint_layers)
        )
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            training._loss(training.dataset.batch([0, 1, 2]))
        training.close()
        kept[checkpoint_layers] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_a_model_in_float16_gets_the_gradient_of_float32(tokenizer, tmp_path):
    try:
        torch.nn.LayerNorm(2).half()(torch.ones(1, 2).half())
    except RuntimeError:
        pytest.skip("this torch has no float16 on a CPU")
    gradients = []
    for dtype in (torch.float32, torch.float16):
        training = Training(tiny_model(FAMILY).to(dtype), tokenizer, TEXTS * 8, settings(batch_tokens=4000), tmp_path)
        training._one_step([(training.dataset, training._pieces)])
        gradients.append(training.rows.parameter.grad.flatten())
        training.close()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_rows_begin_as_what_is_asked_for(tokenizer, tmp_path):
    model = tiny_model(FAMILY)
    matrix = model.get_input_embeddings().weight.detach().numpy()
    dataset = Dataset.write(documents("<|endoftext|>".join(TEXTS)), tokenizer, tmp_path, 32)

    def ids(**changes):
        rows = initial_rows(model, tokenizer, settings(**changes), dataset)
        found = [np.flatnonzero((matrix == row).all(axis=1)) for row in rows]
        assert all(len(each) == 1 for each in found)
        return [int(each[0]) for each in found]

    rows = initial_rows(model, tokenizer, settings(initial="words", initial_text="the rain, lamp", n_tokens=5), dataset)
    for row, word in zip(rows, (" the rain", " lamp")):
        assert np.allclose(row, matrix[tokenizer(word, add_special_tokens=False).input_ids].mean(axis=0))
    assert (matrix[:, None] == rows[2:]).all(axis=2).any(axis=0).all()  # the others are rows of the matrix
    assert len({row.tobytes() for row in rows[2:]}) > 1
    assert (
        len(initial_rows(model, tokenizer, settings(initial="words", initial_text="a b c", n_tokens=2), dataset)) == 2
    )
    assert ids(initial_text="The rain came in") == tokenizer("The rain came in", add_special_tokens=False).input_ids[:4]
    assert tokenizer.decode(ids(n_tokens=8)) in " ".join(TEXTS)
    sampled = [ids(initial="vocabulary", seed=seed, n_tokens=8) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_rows_that_leave_the_module_are_brought_to_the_matrix(tokenizer):
    if "gemma2" not in FAMILIES:
        pytest.skip("this release has no model that scales its embedding inside the module")
    model = tiny_model("gemma2")
    scale = matrix_of(model).scale
    rows = np.ones((4, 32), np.float32)
    found = initial_rows(model, tokenizer, QUICK, None, SoftPrompt(rows, scale="module"))
    assert np.allclose(found, rows / scale)


def test_an_interruption_inside_a_step_leaves_the_checkpoint_before_it(tokenizer, tmp_path):
    wanted = train(tiny_model(FAMILY), tokenizer, TEXTS, QUICK)
    training = Training(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)
    steps = training.run()
    for _ in range(3):
        next(steps)
    step = training._optimizer.step

    def interrupted():
        step()
        raise KeyboardInterrupt

    training._optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    training.close()
    again = train(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)
    assert again.rows.tobytes() == wanted.rows.tobytes()


def test_a_gradient_that_is_no_number_reaches_no_row(tokenizer, tmp_path):
    training = Training(tiny_model(FAMILY), tokenizer, TEXTS, QUICK, tmp_path)
    training.rows.parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(errors.Diverged, match="smaller learning rate"):
        list(training.run())
    training.close()
    assert np.isfinite(training.softprompt().rows).all() and np.isfinite(training.rows.rows).all()


class TestDataset:
    def test_documents_never_share_a_piece_and_nothing_is_lost(self, tokenizer, tmp_path):
        texts = ["a " * 50, "b", "c " * 7]
        dataset = Dataset.write(documents("<|endoftext|>".join(texts)), tokenizer, tmp_path, 16)
        ids = [dataset.batch([piece]).ids[0].tolist() for piece in range(len(dataset))]
        assert all(piece[0] == tokenizer.bos_token_id for piece in ids)
        assert max(map(len, ids)) <= 16
        whole = [[]]
        for piece in ids:
            whole[-1] += piece[1:]
            if piece[-1] == tokenizer.eos_token_id:
                whole.append([])
        assert [tokenizer.decode(each, skip_special_tokens=True).strip() for each in whole[:-1]] == [
            text.strip() for text in texts
        ]

    def test_only_what_is_learned_has_a_label(self, tokenizer, tmp_path):
        passage = Passage((("the rain", False), (" came in", True)), "")
        dataset = Dataset.write([passage], tokenizer, tmp_path, 64)
        batch = dataset.batch([0])
        learned = batch.ids[batch.labels != -100]
        assert tokenizer.decode(learned[:-1]).strip() == "came in"
        assert learned[-1] == tokenizer.eos_token_id

    def test_held_out_documents_are_whole_and_the_same_each_time(self, tokenizer, tmp_path):
        dataset = Dataset.write(documents("<|endoftext|>".join(TEXTS)), tokenizer, tmp_path, 16)
        first, second = dataset.split(0.25, 3), Dataset(tmp_path).split(0.25, 3)
        assert first == second
        kept, held = first
        assert sorted(kept + held) == list(range(len(dataset)))
        assert not {dataset._documents[piece] for piece in kept} & {dataset._documents[piece] for piece in held}

    def test_of_some_books_the_ends_are_held_out_and_no_whole_book(self, tokenizer, tmp_path):
        dataset = Dataset.write(documents("<|endoftext|>".join(["a " * 400, "b " * 800])), tokenizer, tmp_path, 16)
        kept, held = dataset.split(0.1, 0)
        assert 0.05 < len(held) / len(dataset) < 0.15
        assert {dataset._documents[piece] for piece in held} == {0, 1} == {dataset._documents[piece] for piece in kept}

    def test_no_more_is_held_out_than_is_looked_at(self, tokenizer, tmp_path):
        dataset = Dataset.write(documents("<|endoftext|>".join(TEXTS * 10)), tokenizer, tmp_path, 16)
        _, held = dataset.split(0.5, 0, most_tokens=400)
        assert sum(map(dataset.length, held)) < 600

    def test_files_are_tokenised_once_and_again_when_they_change(self, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("The door opened. " * 20, encoding="utf-8")
        written = []
        for text in (None, None, "The rain came in. " * 20):
            if text:
                (tmp_path / "a.txt").write_text(text, encoding="utf-8")
            train(tiny_model(FAMILY), tokenizer, tmp_path / "a.txt", settings(steps=1), tmp_path / "work")
            (tmp_path / "work" / "checkpoint.npz").unlink()
            written.append((tmp_path / "work" / "tokens.ids").stat().st_mtime_ns)
        assert written[0] == written[1] != written[2]

    def test_half_of_the_tokens_is_not_taken_for_the_whole(self, tokenizer, tmp_path):
        """As a power cut may leave them."""
        (tmp_path / "a.txt").write_text("The door opened. " * 20, encoding="utf-8")
        whole = train(tiny_model(FAMILY), tokenizer, tmp_path / "a.txt", settings(steps=1), tmp_path / "work")
        (tmp_path / "work" / "checkpoint.npz").unlink()
        with open(tmp_path / "work" / "tokens.ids", "r+b") as file:
            file.truncate(10)
        again = train(tiny_model(FAMILY), tokenizer, tmp_path / "a.txt", settings(steps=1), tmp_path / "work")
        assert again.rows.tobytes() == whole.rows.tobytes()

    def test_a_book_is_tokenised_in_pieces_and_is_whole(self, tokenizer, tmp_path, monkeypatch):
        from kobold_sp_plugin.training import dataset

        monkeypatch.setattr(dataset, "_AT_ONCE", 40)
        given = []

        def noted(text, **options):
            given.append(text)
            return tokenizer(text, **options)

        noted.eos_token_id = None
        for text in ("The door opened.\n" * 20, "The door opened and " * 20, "x\n" + "y" * 90 + "\nz", "rain"):
            given.clear()
            ids, learned = dataset._tokens(next(documents(text)), noted, "\n")
            assert "".join(given) == text.strip("\n") and max(map(len, given)) <= 40
            assert len(ids) == len(learned) and all(learned)
        assert tokenizer.decode(ids) == "rain"

    def test_half_of_a_character_is_no_trouble(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "The door \\ud83d opened."}', encoding="utf-8")
        dataset = Dataset.write(passages(tmp_path / "a.jsonl"), tokenizer, tmp_path, 32)
        assert "opened" in tokenizer.decode(dataset.batch([0]).ids[0])

    def test_batches_hold_every_piece_once_and_keep_to_their_size(self, tokenizer, tmp_path):
        dataset = Dataset.write(documents("<|endoftext|>".join(TEXTS)), tokenizer, tmp_path, 16)
        batches = dataset.batches(range(len(dataset)), 100, 4, "0:0")
        assert sorted(piece for batch in batches for piece in batch) == list(range(len(dataset)))
        assert all(len(batch) * (max(map(dataset.length, batch)) + 4) <= 100 for batch in batches)
        assert batches != dataset.batches(range(len(dataset)), 100, 4, "0:1")

    def test_cut_anew_the_same_tokens_are_in_other_pieces_no_longer_than_before(self, tokenizer, tmp_path):
        dataset = Dataset.write(
            documents("<|endoftext|>".join(["the " * 100, "a " * 60, "rain"])), tokenizer, tmp_path, 16
        )

        def texts(cut, pieces):
            ids = [cut.batch([piece]).ids[0, len(cut.prefix) :].tolist() for piece in pieces]
            return ["/".join(map(str, each)) for each in ids]

        kept = [piece for piece in range(len(dataset)) if piece != 4]  # as a held-out piece of a book
        wanted = texts(dataset, kept)
        first, again, other = (dataset.cut_anew(kept, order) for order in ("0:0", "0:0", "0:1"))
        found = [texts(cut, range(len(cut))) for cut in (first, again, other)]
        assert found[0] == found[1] != found[2] and wanted not in found
        for cut, pieces in zip((first, other), (found[0], found[2])):
            assert "/".join(pieces) == "/".join(wanted)
            assert max(map(cut.length, range(len(cut)))) <= max(map(dataset.length, range(len(dataset))))
            assert pieces[-1] == wanted[-1], "what fits one piece stays whole"
            assert [cut.is_beginning(piece) for piece in range(len(cut))].count(True) == 3

    def test_cut_anew_nothing_is_joined_that_was_apart(self, tokenizer, tmp_path):
        """What is not learned is left out where it fills a piece; what stands before it and after it do not meet."""
        parts = (("a " * 22, True), ("the " * 64, False), ("rain " * 32, True))
        dataset = Dataset.write([Passage(parts, "")], tokenizer, tmp_path, 16)
        for order in range(20):
            cut = dataset.cut_anew(range(len(dataset)), order)
            texts = [tokenizer.decode(cut.batch([piece]).ids[0]) for piece in range(len(cut))]
            assert not any("a a" in text and "rain" in text for text in texts)

    def test_cut_anew_no_piece_is_a_few_words_out_of_nowhere(self, tokenizer, tmp_path):
        dataset = Dataset.write(
            documents("the " * 65),
            tokenizer,
            tmp_path,
            64 + len(Dataset.write(documents("a"), tokenizer, tmp_path / "a", 64).prefix),
        )
        for order in range(100):
            cut = dataset.cut_anew(range(len(dataset)), order)
            assert (
                min(map(cut.length, range(len(cut))))
                >= len(cut.prefix) + max(map(dataset.length, range(len(dataset)))) // 8
            )

    def test_one_document_is_not_held_out_whole(self, tokenizer, tmp_path):
        dataset = Dataset.write(documents("the " * 60), tokenizer, tmp_path, 16)
        kept, held = dataset.split(0.5, 0)
        assert kept and held

    def test_cut_anew_no_piece_is_without_anything_to_learn(self, tokenizer, tmp_path):
        passage = Passage((("the " * 60, False), ("a " * 20, True)), "")
        dataset = Dataset.write([passage], tokenizer, tmp_path, 16)
        for order in range(20):
            cut = dataset.cut_anew(range(len(dataset)), order)
            assert all((cut.batch([piece]).labels != IGNORED).any() for piece in range(len(cut)))

    def test_without_a_text_there_is_a_clear_error(self, tokenizer, tmp_path):
        with pytest.raises(errors.NoData, match="every document in it is empty"):
            Dataset.write(documents("  \n<|endoftext|>"), tokenizer, tmp_path, 16)


@pytest.mark.parametrize("name, value", [("n_tokens", 0), ("learning_rate", -1.0), ("optimizer", "sgd"), ("block", 1)])
def test_a_setting_that_cannot_be_is_named(name, value):
    with pytest.raises(errors.BadSetting, match=name):
        settings(**{name: value})


@pytest.mark.parametrize("initial, text, why", [("words", " ", "there are none"), ("vocabulary", "Rain.", "no part")])
def test_settings_that_contradict_each_other_are_named(initial, text, why):
    with pytest.raises(errors.BadSetting, match=why):
        settings(initial=initial, initial_text=text)


def test_of_little_data_batches_are_small_and_of_much_no_larger_than_helps(tokenizer, tmp_path):
    def found(texts, folder):
        training = Training(tiny_model(FAMILY), tokenizer, texts, settings(batch_tokens=None), tmp_path / folder)
        training.close()
        return training.batch_tokens

    assert found(TEXTS, "little") == 512
    assert 512 < found(TEXTS * 100, "some") < found(TEXTS * 1000, "much") == 1024


def test_a_fused_activation_computes_the_same_and_keeps_less(tokenizer):
    from kobold_sp_plugin.training.frozen import frozen

    model = tiny_model("gpt2").eval()
    ids = torch.arange(3, 40)[None]

    def looked():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: sizes.append(each.numel()) or each, lambda each: each
        ):
            logits = model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits
        return logits.detach(), sum(sizes)

    model.requires_grad_(False)
    plain, kept = looked()
    restore = frozen(model, False)
    fused, kept_fused = looked()
    restore()
    assert torch.allclose(plain, fused, atol=1e-5)
    assert kept_fused < 0.8 * kept
    assert torch.equal(looked()[0], plain)
