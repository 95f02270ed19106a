"""Which runs are of one model, and beside which baseline each stands."""

import itertools

import pytest

from bitpress.eval.report.runs import reported_runs


def run(scheme, size, identity=None, parameters=None, name="checkpoint-1000", revision=None, **changes):
    model = {"id": name, "revision": revision, "parameters": parameters}
    model |= {"identity": identity} if identity else {}
    return {"scheme": scheme, "model": model, "size": {"file_bytes": size}, "name": "test", **changes}


def baselines(runs):
    """{size of a quantized run: size of the baseline beside it}; the same for every order of the runs."""
    answers = []
    for order in itertools.permutations(runs):
        reported = reported_runs(order)
        assert len(reported) == len(runs)
        titles = [r.title for r in reported]
        assert len(set(titles)) == len(titles)
        pairs = {
            r.get("size", "file_bytes"): r.baseline and r.baseline["size"]["file_bytes"]
            for r in reported
            if not r.is_baseline
        }
        answers.append((titles, pairs))
    assert all(answer == answers[0] for answer in answers)
    return answers[0][1]


def test_two_folders_of_one_name_are_two_models_by_what_they_are():
    runs = [run("none", 100, "a" * 64), run("nf4", 30, "a" * 64), run("none", 100, "b" * 64), run("nf4", 31, "b" * 64)]
    runs[2]["size"]["file_bytes"] = 101
    assert baselines(runs) == {30: 100, 31: 101}
    assert {r.model for r in reported_runs(runs)} == {"checkpoint-1000 (aaaaaaaa)", "checkpoint-1000 (bbbbbbbb)"}


def test_one_model_in_two_folders_is_one():
    runs = [run("none", 100, "a" * 64, name="here"), run("nf4", 30, "a" * 64, name="there")]
    assert baselines(runs) == {30: 100}


def test_older_runs_differ_by_their_parameters():
    runs = [run("none", 100, None, 50), run("nf4", 30, None, 50), run("none", 200, None, 90), run("nf4", 60, None, 90)]
    assert baselines(runs) == {30: 100, 60: 200}
    assert {r.model for r in reported_runs(runs)} == {
        "checkpoint-1000 (50 parameters)",
        "checkpoint-1000 (90 parameters)",
    }


def test_older_runs_whose_baselines_differ_in_size_stand_beside_none():
    """Nothing says of which of the two models the quantized run is."""
    assert baselines([run("none", 100), run("none", 200), run("nf4", 30)]) == {30: None}


def test_an_older_run_stands_beside_a_newer_one_of_its_model():
    assert baselines([run("none", 100, "a" * 64, 50), run("nf4", 30, None, 50)]) == {30: 100}
    assert baselines([run("none", 100, "a" * 64, 50), run("nf4", 30, None, 60)]) == {30: None}


def test_revisions_are_models_and_a_run_without_facts_joins_its_id():
    runs = [
        run("none", 100, revision="aa" * 20),
        run("nf4", 30, revision="aa" * 20),
        run("none", 200, revision="bb" * 20),
    ]
    assert baselines(runs) == {30: 100}
    assert {r.model for r in reported_runs(runs)} == {"checkpoint-1000@aaaaaaaa", "checkpoint-1000@bbbbbbbb"}
    assert baselines([run("none", 100, None, 50), {"scheme": "nf4", "model": {"id": "checkpoint-1000"}}]) == {None: 100}


@pytest.mark.parametrize("name", ["x (2)", "x@aaaaaaaa", None])
def test_titles_that_meet_by_chance_lose_no_run(name):
    runs = [run("none", 1, name="x"), run("none", 2, name="x"), run("none", 3, name=name), run("none", 4, name=name)]
    assert len({r.model for r in reported_runs(runs)}) == 4
