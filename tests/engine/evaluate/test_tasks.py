"""The evaluation tasks against independent implementations on the same features."""

import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harmony_fast.engine.checkpoint import write_weights_only
from harmony_fast.engine.config import dump_config, parse_config
from harmony_fast.engine.data.pictures import Picture, PictureSet
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.evaluate import evaluate_run, load_towers
from harmony_fast.engine.evaluate.chance import agreement, with_levels
from harmony_fast.engine.evaluate.features import extract, finite
from harmony_fast.engine.evaluate.knn import TEMPERATURE, knn
from harmony_fast.engine.evaluate.ranking import chance_within, ranks_of_best
from harmony_fast.engine.evaluate.retrieval import retrieval
from harmony_fast.engine.evaluate.share import ALONE, Share
from harmony_fast.engine.evaluate.zero_shot import class_weights, zero_shot
from harmony_fast.harmony.model import Harmony
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize


def unit(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(n=st.integers(15, 60), seed=st.integers(0, 99))
def test_zero_shot_is_scikit_learns_top_k(n: int, seed: int) -> None:
    classes = [f"class {i}" for i in range(12)]
    images, weights = unit(n, 8, seed=seed), unit(12, 8, seed=seed + 100)
    truth = np.arange(n) % 12
    ours = zero_shot(images, weights, [classes[t] for t in truth], {name: name for name in classes})
    scores = (images @ weights.T).numpy()
    for k in (1, 5, 10):
        assert ours[f"top{k}"] == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=range(12)))


@given(n=st.integers(11, 40), seed=st.integers(0, 99))
def test_retrieval_is_top_k_accuracy_over_pairs(n: int, seed: int) -> None:
    images, texts = unit(n, 8, seed=seed), unit(n, 8, seed=seed + 100)
    ours = retrieval(images, texts, [f"caption {i}" for i in range(n)])
    for name, scores in (("image_to_text", images @ texts.T), ("text_to_image", texts @ images.T)):
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(np.arange(n), scores.numpy(), k=k, labels=range(n))
            assert ours[name][f"r{k}"] == pytest.approx(expected)


@given(n=st.integers(5, 40), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_knn_is_scikit_learns_with_the_same_weights(n: int, k: int, seed: int) -> None:
    queries, bank = unit(n, 6, seed=seed), unit(30, 6, seed=seed + 100)
    bank_labels, labels = [f"l{i % 4}" for i in range(30)], [f"l{i % 5}" for i in range(n)]
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(bank.numpy(), bank_labels)
    expected = np.mean(theirs.predict(queries.numpy()) == np.array(labels))
    assert knn(3 * queries, labels, bank * 2, bank_labels, k)["top1"] == pytest.approx(expected)


def test_a_collapsed_model_scores_nothing() -> None:
    """Equal scores everywhere must rank last, not first."""
    same_everywhere = torch.ones(20, 4) / 2
    names = [str(i) for i in range(20)]
    found = zero_shot(same_everywhere, same_everywhere, names, {name: name for name in names})
    assert {found[name] for name in found if name != "chance"} == {0}
    assert retrieval(same_everywhere, same_everywhere, names)["image_to_text"] == {"r1": 0, "r5": 0, "r10": 0}
    with pytest.raises(UserError, match="not finite"):
        finite(torch.tensor([1.0, float("nan")]), "features")


def test_equal_captions_answer_each_other() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4], [0.9, 0.1, 0.2]])
    right = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert ranks_of_best(scores, right).tolist() == [0, 1, 1]


def test_of_classes_with_one_name_the_first_is_found() -> None:
    names = {"n1": "missile", "n2": "cat", "n3": "missile"}
    weights = normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=-1)  # of missile and cat
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for label, image, top1 in (("n1", 0, 1), ("n2", 1, 1), ("n3", 2, 0)):
        found = zero_shot(images[image : image + 1], weights, [label], names)
        assert (found["top1"], found["top5"]) == (top1, 1)
    found = zero_shot(images, weights, list(names), names)
    assert (found["top1"], found["mean_per_class"]) == pytest.approx((2 / 3, 2 / 3))
    assert found["chance"] == {"top1": 1 / 3, "top5": 1, "top10": 1, "mean_per_class": 1 / 3}


@given(of=st.integers(1, 30), right=st.lists(st.integers(0, 30), min_size=1, max_size=4), k=st.integers(1, 12))
@example(of=5, right=[0, 5], k=10)
def test_chance_of_a_random_order(of: int, right: list[int], k: int) -> None:
    right = [min(count, of) for count in right]
    drawn = min(k, of)
    missed = [math.comb(of - count, drawn) / math.comb(of, drawn) for count in right]
    assert chance_within(torch.tensor(right), of, k) == pytest.approx(1 - sum(missed) / len(missed))


def test_what_guessing_would_score() -> None:
    images, texts = unit(4, 8, seed=0), unit(6, 8, seed=1)
    captions, owners = ["one", "two", "one", "three", "four", "five"], [0, 0, 1, 2, 3, 3]
    chance = retrieval(images, texts, captions, owners)["chance"]
    assert chance["image_to_text"]["r1"] == pytest.approx((3 + 2 + 1 + 2) / 4 / 6)  # image 0 is right with both "one"
    assert chance["text_to_image"]["r1"] == pytest.approx((2 + 1 + 2 + 1 + 1 + 1) / 6 / 4)
    own = retrieval(images, texts, captions, owners, own_only=True)["chance"]
    assert own["image_to_text"]["r1"] == pytest.approx(6 / 4 / 6) and own["text_to_image"]["r1"] == 1 / 4
    assert agreement(["a", "a", "b"], ["a", "c"]) == pytest.approx(1 / 3)
    metrics = {"knn": {"k5": {"top1": 0.5}, "lr": "1", "chance": {"top1": 0.1}}, "retrieval": {"a": {"r1": 0.2}}}
    assert [*with_levels(metrics)] == [("knn/k5/top1", 0.5, 0.1), ("knn/lr", "1", None), ("retrieval/a/r1", 0.2, None)]


def test_prompts_are_averaged() -> None:
    table = {"a cat": [1.0, 0.0], "the cat": [0.0, 1.0]}
    weights = class_weights(lambda texts: torch.tensor([table[t] for t in texts]), ["cat"], ["a {}", "the {}"])
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5**0.5))


def save_run(folder: Path, raw: dict) -> Path:
    """A run folder with an untrained model."""
    config = parse_config(raw, "test")
    write_weights_only(folder, 1, Harmony(config).state_dict())
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture
def run_folder(
    tiny: dict, tmp_path: Path, picture: Callable[..., Image.Image], encoded: Callable[..., bytes], tar: Callable
) -> Path:
    """A run of an untrained model, with a labelled set of 12 pictures."""
    files = []
    for i in range(12):
        label = json.dumps({"name": f"thing {i}", "subcategory": f"kind {i % 3}"}).encode()
        files += [
            (f"{i}.png", encoded(picture(i, 40, 30), "PNG")),
            (f"{i}.txt", f"thing {i}".encode()),
            (f"{i}.json", label),
        ]
    path = str(tar("set.tar", files))
    tiny["evaluate"] = {"data": [path], "bank": [path]}
    return save_run(tmp_path / "run", tiny)


def test_metrics_have_the_promised_shape(run_folder: Path) -> None:
    evaluate_run(run_folder, [], [])
    metrics = json.loads((run_folder / "metrics.json").read_text())
    recalls = {"r1", "r5", "r10"}
    assert metrics["zero_shot"].keys() - {"chance"} == {"top1", "top5", "top10", "mean_per_class"}
    directions = metrics["retrieval"].pop("chance").keys()
    assert metrics["retrieval"].keys() == directions == {"image_to_text", "text_to_image"}
    assert all(direction.keys() == recalls for direction in metrics["retrieval"].values())
    assert metrics["knn"].keys() == {"top1", "chance"}
    assert metrics["zero_shot"]["chance"]["top1"] == 1 / 12
    assert metrics["knn"]["chance"] == {"top1": pytest.approx(1 / 3)}
    # every query is its own nearest neighbour in the bank
    assert evaluate_run(run_folder, ["knn"], ["evaluate.neighbours=1"])["knn"]["top1"] == 1.0
    assert json.loads((run_folder / "metrics.json").read_text()).keys() == {"zero_shot", "retrieval", "knn"}


@pytest.mark.parametrize(("tasks", "settings", "message"), [
    (["sleep"], [], "unknown task 'sleep'; one of zero-shot"),
    ([], ["evaluate.data=[]"], "evaluate.data is empty"),
    (["knn"], ["evaluate.group_key=colour"], "set.tar: 0 has no label 'colour'; it has: name, subcategory"),
    (["linear"], ["evaluate.bank=[]"], "this run cannot do linear: evaluate.bank names no labelled samples"),
    (["linear"], ["evaluate.linear.blocks=3"], "features of 3 blocks asked for, the image tower has 2"),
    (["knn"], ["evaluate.neighbours=[5,13]"], "13 neighbours asked for (evaluate.neighbours), the bank has 12"),
    (["few-shot"], ["evaluate.few_shot.shots=[5]"], "the class 'kind 0' has 4"),
    (["zero-shot"], ["evaluate.templates=photos"], "'photos' is neither imagenet nor simple nor a file"),
    (["zero-shot"], ["evaluate.templates=[a {}, the {}]"], "not a list as YAML has it: put each template in quotes"),
    (["zero-shot"], ["data.tokenizer=nobody"], "nobody: neither 'clip', nor an open_clip model"),
    (["zero-shot"], ["evaluate.classes=nowhere.txt"], "nowhere.txt: cannot be read"),
    (["knn"], ["evaluate.bank=[]"], "this run cannot do knn"),
    ([], ["evaluate.data=[nowhere.tar]"], "nowhere.tar"),
    ([], ["evaluate.dta=[x]"], "did you mean 'evaluate.data'"),
])  # fmt: skip
def test_mistakes_are_named(run_folder: Path, tasks: list[str], settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate_run(run_folder, tasks, settings)
    assert message in str(error.value)


def test_what_is_no_run_is_named(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder"):
        evaluate_run(tmp_path, [], [])
    weights = run_folder / "checkpoints" / "step-00000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"weights.safetensors is damaged"):
        evaluate_run(run_folder, [], [])
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        evaluate_run(run_folder, [], [])


@pytest.fixture
def folders(tmp_path: Path, picture: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> Path:
    """Folders `train` and `test` with subfolders for three classes of ten and four pictures."""
    for part, count in (("train", 10), ("test", 4)):
        for label in range(3):
            folder = tmp_path / part / f"n{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encoded(picture(100 * label + i + count, 40, 30), "PNG"))
    return tmp_path


def test_folders_of_classes_serve_every_task(
    run_folder: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "names.txt").write_text("cat\ndog\nhorse\n")
    (folders / "test" / "n1" / "0.png").write_bytes(b"broken")
    settings = [
        f"evaluate.data={folders / 'test'}", f"evaluate.bank={folders / 'train'}",
        f"evaluate.classes={folders / 'names.txt'}", "evaluate.templates=simple", "evaluate.neighbours=[3, 5]",
        "evaluate.linear.epochs=2", "evaluate.linear.blocks=2", "evaluate.linear.average_patches=true",
        "evaluate.few_shot.shots=[1, 2]",
    ]  # fmt: skip
    metrics = evaluate_run(run_folder, ["zero-shot", "knn", "linear", "few-shot"], settings)
    assert metrics["zero_shot"].keys() - {"chance"} == {"top1", "top5", "top10", "mean_per_class"}
    assert metrics["knn"].keys() == {"k3", "k5", "chance"} and metrics["few_shot"].keys() == {"k1", "k2", "chance"}
    assert metrics["linear"].keys() == {"top1", "top5", "lr", "top1_by_lr", "chance"}
    said = capsys.readouterr()
    assert f"left out: {folders / 'test' / 'n1' / '0.png'}: image not readable" in said.err
    assert "few_shot" in said.out and "k2 top1" in said.out
    assert json.loads((run_folder / "metrics.json").read_text()) == metrics
    about = {"data": "test", "bank": "train", "branch": "teacher", "checkpoint": "step-00000001"}
    assert json.loads((run_folder / "metrics.about.json").read_text()) == dict.fromkeys(metrics, about)
    with pytest.raises(UserError, match="has no caption"):
        evaluate_run(run_folder, ["retrieval"], settings)
    (folders / "one").mkdir()
    only = (folders / "test" / "n1").rename(folders / "one" / "n1")
    with pytest.raises(UserError, match="all samples have the name 'n1'"):
        evaluate_run(run_folder, ["zero-shot"], [f"evaluate.data={only.parent}"])
    for file in only.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="no picture in it is usable"):
        evaluate_run(run_folder, ["zero-shot"], [f"evaluate.data={only.parent}"])


def test_pictures_are_let_go_once_encoded(run_folder: Path, picture: Callable[..., Image.Image]) -> None:
    """A set may be larger than memory: what tars and .beton files yield holds the file's bytes."""
    config, towers, _ = load_towers(run_folder, ["evaluate.batch_size=2", "evaluate.workers=1"])
    given: list[weakref.ref[Picture]] = []
    alive = []

    def read() -> Iterator[Picture]:
        for i in range(40):
            one = Picture(str(i), lambda: picture(1, 40, 30), (), {})
            given.append(weakref.ref(one))
            alive.append(sum(each() is not None for each in given))
            yield one

    features = extract(towers, PictureSet("a set", None, False, read), config, 1, ALONE)
    assert len(features.names) == 40 and max(alive) < 20


def encode_a_share(rank: int, run_folder: Path, store: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    evaluate_run(run_folder, [], [], Share(rank, 2))


def test_ranks_share_the_encoding(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes get what one gets."""
    alone = evaluate_run(run_folder, [], [])
    (run_folder / "metrics.json").unlink()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = torch.multiprocessing.get_context("fork")  # not spawn: importing everything again takes a while
    processes = [context.Process(target=encode_a_share, args=(r, run_folder, tmp_path / "store")) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads((run_folder / "metrics.json").read_text()) == alone
