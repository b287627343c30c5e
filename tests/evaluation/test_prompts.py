"""Prompt files are read line by line, near-duplicates stay together, a split is fixed."""

import json

import pytest

from app.errors import DataError
from app.evaluation.prompts import NEAR_DUPLICATE, Prompt, load_prompts, split_prompts
from app.near_duplicates import cluster_texts

LONG = "please explain to me in detail how a bicycle stays upright while somebody is riding it along the road"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(count, cluster=lambda i: str(i)):
    return [Prompt(str(i), f"prompt {i}", cluster(i)) for i in range(count)]


def test_near_duplicates_share_a_cluster_whatever_the_order():
    texts = [LONG, "what is tea", LONG + " today", "what is rain"]
    first = cluster_texts(texts, threshold=NEAR_DUPLICATE)
    assert first[0] == first[2]
    assert len(set(first)) == 3
    assert cluster_texts(texts[::-1], threshold=NEAR_DUPLICATE) == first[::-1]


def test_repeated_prompts_count_once_and_are_counted(tmp_path):
    found = load_prompts(write(tmp_path / "p.jsonl", {"prompt": "Hi there"}, {"prompt": "hi there!"}, {"prompt": "x"}))
    assert [p.text for p in found.prompts] == ["Hi there", "x"]
    assert found.repeated == 1


def test_ids_and_clusters_of_the_file_are_kept(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "id": 7, "cluster": "c"}, {"prompt": "b", "cluster": "c"})
    found = load_prompts(path).prompts
    assert found[0] == Prompt("7", "a", "c")
    assert found[1].cluster == "c"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "line 2"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        (b'{"prompt": "a"}\n\n{nonsense\n', "line 3"),
        (b'["a"]\n', "line 1"),
        (b"\n", "no prompts"),
        (b'{"prompt": "\xff"}\n', "cannot be read"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "id `1`"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, content, words):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_split_is_fixed_by_its_seed_and_tears_no_cluster():
    items = prompts(300, cluster=lambda i: str(i // 3))
    split = split_prompts(items, held_out=120, min_train=60, seed=0)
    assert split == split_prompts(items[::-1][::-1], held_out=120, min_train=60, seed=0)
    assert split != split_prompts(items, held_out=120, min_train=60, seed=1)
    assert 120 <= len(split.held_out) <= 122
    assert len(split.train) + len(split.held_out) == 300
    assert not {p.cluster for p in split.train} & {p.cluster for p in split.held_out}


def test_too_few_prompts_are_refused_with_the_number_needed():
    with pytest.raises(DataError, match="at least 180 prompts"):
        split_prompts(prompts(100), held_out=120, min_train=60, seed=0)
    with pytest.raises(DataError, match="near-duplicates"):
        split_prompts(prompts(300, cluster=lambda i: str(i % 2)), held_out=160, min_train=60, seed=0)


def test_a_large_cluster_does_not_starve_the_training_side():
    items = prompts(200, cluster=lambda i: "large" if i < 90 else str(i))
    split = split_prompts(items, held_out=100, min_train=60, seed=4)
    assert len(split.train) >= 60
    assert len(split.held_out) >= 100
