"""Tasks that learn from labelled samples, and prompts, against scikit-learn, torchmetrics and open_clip."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.evaluate.classes import class_names
from harmony_fast.engine.evaluate.few_shot import draw, few_shot, logistic_regression
from harmony_fast.engine.evaluate.knn import TEMPERATURE, knn
from harmony_fast.engine.evaluate.linear import linear, train_probe
from harmony_fast.engine.evaluate.retrieval import retrieval
from harmony_fast.engine.evaluate.share import Share
from harmony_fast.engine.evaluate.zero_shot import class_weights, prompts
from harmony_fast.engine.evaluate_config import FewShotConfig, LinearConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import build_zero_shot_classifier
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate

CPU = torch.device("cpu")


def clouds(n: int, classes: int, width: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, list[str]]:
    """Points around one centre per class, the same for every seed, and their labels."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + spread * noise, [f"class {i}" for i in labels.tolist()]


@pytest.mark.parametrize("templates", ["imagenet", "simple", ["a {}.", "the {}"]])
def test_zero_shot_weights_are_open_clips(templates: list[str] | str) -> None:
    theirs = {"imagenet": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    classes = [f"thing {i}" for i in range(70)] + ["crane {bird}"]
    table: dict[str, torch.Tensor] = {}

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.stack([table.setdefault(t, normalize(torch.randn(8), dim=0)) for t in texts])

    # open_clip's own function, with a "tokenizer" that numbers texts and a "model" that looks them up.
    known: list[str] = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        known.extend(texts)
        return torch.arange(len(known) - len(texts), len(known))

    model = SimpleNamespace(encode_text=lambda tokens, normalize: embed([known[i] for i in tokens.tolist()]))
    expected = build_zero_shot_classifier(model, tokenizer, classes, theirs.get(str(templates), templates))
    torch.testing.assert_close(class_weights(embed, classes, templates), expected.T)
    assert len(prompts(templates)) == {"imagenet": 80, "simple": 7}.get(str(templates), 2)


@settings(max_examples=20)
@given(n=st.integers(3, 30), each=st.integers(1, 6), seed=st.integers(0, 99))
def test_retrieval_with_several_captions_is_torchmetrics_hit_rate(n: int, each: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = normalize(torch.randn(n, 8, generator=generator), dim=-1)
    owners = [i for i in range(n) for _ in range(1 + (i + seed) % each)]
    texts = normalize(torch.randn(len(owners), 8, generator=generator), dim=-1)
    ours = retrieval(images, texts, [str(i) for i in range(len(owners))], owners)
    correct = torch.tensor(owners)[None] == torch.arange(n)[:, None]
    for name, scores, right in (
        ("image_to_text", images @ texts.T, correct), ("text_to_image", texts @ images.T, correct.T)
    ):  # fmt: skip
        for k in (1, 5, 10):
            hits = [retrieval_hit_rate(s, r, top_k=min(k, len(s))) for s, r in zip(scores, right, strict=True)]
            assert ours[name][f"r{k}"] == pytest.approx(float(torch.stack(hits).mean()))


def test_equal_captions_of_other_images_count_only_where_wanted() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 1]])
    words = ["a dog", "a dog", "a cat"]
    assert retrieval(images, texts, words)["text_to_image"]["r1"] == 1
    assert retrieval(images, texts, words, own_only=True)["text_to_image"]["r1"] == pytest.approx(2 / 3)


@given(seed=st.integers(0, 99), ks=st.lists(st.integers(1, 30), min_size=2, max_size=4, unique=True))
def test_several_k_are_scikit_learns(seed: int, ks: list[int]) -> None:
    bank, labels = clouds(30, 7, 6, seed)
    queries, truth = clouds(25, 7, 6, seed + 100, spread=2.0)
    ours = knn(queries, truth, bank, labels, ks)
    for k in ks:
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
        ).fit(bank.double().numpy(), labels)
        votes = theirs.predict_proba(queries.double().numpy())
        right = np.array([theirs.classes_.tolist().index(t) for t in truth])
        places = (votes > votes[np.arange(len(right)), right][:, None]).sum(1)
        voted = votes[np.arange(len(right)), right] > 0
        assert ours[f"k{k}"] == {
            "top1": pytest.approx((voted & (places < 1)).mean()), "top5": pytest.approx((voted & (places < 5)).mean())
        }  # fmt: skip
    with pytest.raises(UserError, match="31 neighbours asked for"):
        knn(queries, truth, bank, labels, [1, 31])


@settings(max_examples=15)
@given(classes=st.integers(2, 6), c=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_logistic_regression_is_scikit_learns(classes: int, c: float, seed: int) -> None:
    x, _ = clouds(40, classes, 5, seed)
    labels = torch.arange(40) % classes
    weight, bias = logistic_regression(x, labels, classes, c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.double().numpy(), labels.numpy())
    ours = (x.double() @ weight.T + bias).softmax(1)
    if classes > 2:  # with two classes scikit-learn has one weight vector, penalised otherwise
        np.testing.assert_allclose(ours, theirs.predict_proba(x.double().numpy()), atol=2e-5)
    else:
        assert (ours.argmax(1).numpy() == theirs.predict(x.double().numpy())).mean() > 0.95


def test_few_shot_is_scikit_learn_on_the_same_draws() -> None:
    bank, known = clouds(120, 6, 8, seed=1)
    queries, truth = clouds(60, 6, 8, seed=2)
    ours = few_shot(bank, known, queries, truth, FewShotConfig(shots=[1, 5], draws=3, c=3.0))
    labels = torch.tensor([int(label.split()[1]) for label in known])
    for shots in (1, 5):
        scores = []
        for seed in range(3):
            chosen = draw(labels, shots, seed)
            assert labels[chosen].bincount().tolist() == [shots] * 6 and len(set(chosen.tolist())) == len(chosen)
            model = LogisticRegression(C=3.0, tol=1e-8, max_iter=2000)
            model.fit(normalize(bank, dim=-1)[chosen].double().numpy(), labels[chosen].numpy())
            predicted = model.predict(normalize(queries, dim=-1).double().numpy())
            scores.append(np.mean([f"class {p}" == t for p, t in zip(predicted, truth, strict=True)]))
        assert ours[f"k{shots}"] == {"top1": pytest.approx(np.mean(scores)), "spread": pytest.approx(np.std(scores))}
    with pytest.raises(UserError, match="the class 'class 0' has 20"):
        few_shot(bank, known, queries, truth, FewShotConfig(shots=[1, 21]))


def test_probes_trained_at_once_come_out_as_if_trained_alone() -> None:
    x, labels = clouds(64, 3, 5, seed=0)
    truth = torch.tensor([int(label.split()[1]) for label in labels])
    rates = [0.01, 0.1, 1.0]
    together = train_probe(x, truth, 3, LinearConfig(learning_rates=rates, epochs=5, batch_size=16))
    for i, rate in enumerate(rates):
        alone = train_probe(x, truth, 3, LinearConfig(learning_rates=[rate], epochs=5, batch_size=16))
        torch.testing.assert_close(together.logits(x)[i], alone.logits(x)[0])


def test_a_long_linear_probe_is_logistic_regression() -> None:
    """Full batches with weight decay solve scikit-learn's penalised problem on standardised features."""
    x, labels = clouds(90, 3, 4, seed=0, spread=2.0)
    truth = torch.tensor([int(label.split()[1]) for label in labels])
    decay = 0.05
    config = LinearConfig(learning_rates=[256 / 90], epochs=1000, batch_size=90, weight_decay=decay)
    ours = train_probe(x, truth, 3, config).logits(x)[0].softmax(1)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    theirs = LogisticRegression(C=1 / (90 * decay), tol=1e-10, max_iter=5000).fit(standard, truth.numpy())
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(standard), atol=0.02)  # biases decay here, not there


def test_the_linear_probe_chooses_a_rate_that_learns() -> None:
    bank, known = clouds(400, 4, 8, seed=1, spread=0.5)
    queries, truth = clouds(100, 4, 8, seed=2, spread=0.5)
    config = LinearConfig(learning_rates=[1e-9, 0.1], epochs=10, batch_size=64)
    result = linear(bank, known, queries, truth, config, CPU)
    assert result["lr"] == "0.1" and result["top1"] == result["top1_by_lr"]["0.1"] > 0.95
    assert result["top1"] <= result["top5"] == 1.0
    shown: list[str] = []

    class Watched(Share):
        def shown(self, items: Iterable, what: str, total: int | None) -> Iterator:
            shown.append(what)
            return iter(items)

    linear(bank, known, queries, truth, config, CPU, Watched(1, 2))
    assert shown == ["training probes"]  # by the rank's own share, which knows whether to show it
    with pytest.raises(UserError, match="at least 20 labelled samples, the bank has 8"):
        linear(bank[:8], known[:8], queries, truth, config, CPU)


def test_names_of_classes(tmp_path: Path) -> None:
    assert class_names(["b", "a", "b"], None) == {"a": "a", "b": "b"}
    lines = tmp_path / "names.txt"
    lines.write_text("tench\n\ngoldfish\nshark\n")
    assert class_names(["n2", "n1", "n3"], str(lines)) == {"n1": "tench", "n2": "goldfish", "n3": "shark"}
    assert class_names(["2", "00"], str(lines)) == {"00": "tench", "1": "goldfish", "2": "shark"}  # all compete
    assert class_names([str(i) for i in range(1000)], "imagenet")["1"] == "goldfish"
    table = tmp_path / "names.json"
    table.write_text('{"n1": "tench", "n2": "goldfish"}')
    assert class_names(["n2"], str(table)) == {"n1": "tench", "n2": "goldfish"}
    for labels, file, message in (
        (["n1", "n9"], table, "has no name for the class 'n9'"),
        (["3"], lines, "holds 3 names, and there is a class number 3"),
        (["x", "y"], lines, "holds 3 names, the set has 2 classes"),
        (["x"], tmp_path / "nowhere", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            class_names(labels, str(file))
