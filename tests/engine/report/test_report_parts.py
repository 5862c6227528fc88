"""Parts of the report by themselves: status, levels of guessing, samples of damaged files, what is the same."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harmony_fast.engine.data import labelled
from harmony_fast.engine.data.beton import BetonWriter, open_beton
from harmony_fast.engine.data.images import to_jpeg
from harmony_fast.engine.data.labelled import LabelledSample
from harmony_fast.engine.data.parts import tokenize
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.report.metrics import _agreed, _task_table
from harmony_fast.engine.report.neighbours import compare, names_of_images
from harmony_fast.engine.report.run import read_runs
from harmony_fast.engine.report.samples import HeldOut, read_training
from harmony_fast.engine.report.summary import status
from report_runs import ALL, CONTEXT, configuration, drawing, write_run, write_tar


def test_levels_of_guessing_of_several_runs_and_what_is_best() -> None:
    runs = [SimpleNamespace(name=name, place=place) for place, name in enumerate("ab")]
    found = {
        place: {"few_shot/k5": {"top1": value, "spread": value}, "knn": {"top1": value}}
        for place, value in enumerate((0.25, 0.5))
    }
    levels = _agreed([{"knn/top1": 0.1, "few_shot/top1": 0.2}, {"knn/top1": 0.1, "few_shot/top1": 0.3}])
    few, knn = (_task_table(task, runs, found, levels) for task in ("few_shot/k5", "knn"))
    assert few.count("<b>50.0 %</b>") == 1 and "guessing" not in few  # measured on different data
    assert knn.count("<b>50.0 %</b>") == 1 and "10.0 %" in knn.partition("guessing")[2]


def test_names_where_only_some_samples_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "MOST", 4)
    (tmp_path / "names.txt").write_text("\n".join(f"object {letter}" for letter in "ABCDEFGHIJ"))
    evaluate = {"data": [write_tar(tmp_path / "bank.tar", 1, "plain")], "classes": str(tmp_path / "names.txt")}
    config = configuration(tmp_path, {"contrastive": {"embed_dim": 8}}, evaluate=evaluate)
    (run,) = read_runs([write_run(config)])
    names = set(re.findall("object [A-J]", names_of_images(run)))
    right = {f"object {'ABCDEFGHIJ'[int(sample.key)]}" for sample in run.held.queries}
    assert len(right) == 4 and names == right


def test_a_run_that_got_over_a_divergence_is_well(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}, max_steps=50)
    folder = write_run(config)  # up to step 39

    def said() -> str:
        return status(read_runs([folder])[0])

    assert said() == "78 % done"
    for step, expected in ((20, "78 % done"), (45, "diverged: its loss or gradient was not finite")):
        (folder / "diverged-rank-0.json").write_text(json.dumps({"step": step}))
        assert said() == expected
    (folder / "diverged-rank-1.json").write_text("{")
    assert said().startswith("diverged")
    (folder / "finished").touch()
    assert said() == "finished"


def test_runs_whose_length_is_not_known(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"reconstruction": ALL["reconstruction"]})
    folder = write_run(config)
    assert status(read_runs([folder])[0]) == "length unknown: its training data are gone"
    config.data.loader = "webdataset"
    write_run(config)
    assert status(read_runs([folder])[0]) == "length unknown: data.samples is not set"
    (folder / "finished").touch()
    assert status(read_runs([folder])[0]) == "finished"


def test_a_damaged_training_tar_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "cut.tar", 1, "plain"))
    path.write_bytes(path.read_bytes()[:-14_000])
    data = {"train": str(path), "loader": "webdataset", "batch_size": 4}
    config = configuration(tmp_path, {"reconstruction": ALL["reconstruction"]}, data=data)
    assert 0 < len(HeldOut(config).pool[1]) < 10


def test_a_damaged_training_file_is_named(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"masked_language": {"depth": 1}})
    with BetonWriter(config.data.train, 1, CONTEXT) as writer:
        png = io.BytesIO()
        drawing(0, 0).save(png, "PNG")
        jpeg = to_jpeg(png.getvalue(), 512, 8, 90)
        tokens = tokenize("thing", CONTEXT)[0]
        tokens[2] = 1 << 30
        writer.write(jpeg.data, jpeg.width, jpeg.height, tokens, "key")
    with pytest.raises(UserError, match=r"sample 0 \(key 'key'\): caption with token ids .* does not know"):
        read_training(config, 1)
    metadata = open_beton(config.data.train).metadata
    writable = np.memmap(config.data.train, metadata.dtype, "r+", metadata.offset, metadata.shape)
    writable["tokens"][0] = 1 << 40
    writable.flush()
    with pytest.raises(UserError, match=r"sample 0 \(key 'key'\): image or caption outside the file's data"):
        read_training(config, 1)


@pytest.mark.parametrize(("labels", "others", "relation"), [
    ({}, {}, "same"),  # the key is all there is
    ({"name": "cat"}, {"name": "dog"}, ""),
    ({"name": "cat", "subcategory": "animal"}, {"name": "dog", "subcategory": "animal"}, "related"),
    ({"name": "cat"}, {}, ""),
    ({"name": "cat"}, {"name": "cat"}, "same"),
])  # fmt: skip
def test_equal_keys_of_two_sets_say_nothing_beside_classes(
    tmp_path: Path, labels: dict[str, str], others: dict[str, str], relation: str
) -> None:
    config = configuration(tmp_path, {"reconstruction": ALL["reconstruction"]})
    query, other = (LabelledSample("000000", drawing(0, 0), "", known) for known in (labels, others))
    assert compare(config, query, other).label == relation
