"""Each page on an empty and on a filled ledger, with a service that answers real HTTP."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.ledger import Ledger, RunStepRow, now
from app.storage import Home
from tests.dashboard import stage
from tests.dashboard.stage import FakeService

MAIN = str(Path(__file__).parents[2] / "dashboard" / "main.py")
PAGES = ("overview.py", "chat.py", "pairs.py", "runs.py", "models.py")


def opened(page: str = "overview.py", **query: str) -> AppTest:
    tab = AppTest.from_file(MAIN, default_timeout=30).run()
    if page != "overview.py":
        tab.switch_page(page)
        for name, value in query.items():
            tab.query_params[name] = value
        tab.run()
    assert not tab.exception, [e.message for e in tab.exception]
    return tab


def words(tab: AppTest) -> str:
    return "\n".join(e.value for e in [*tab.text, *tab.code])


def press(tab: AppTest, label: str) -> AppTest:
    button = next(b for b in tab.button if b.label == label)
    assert not button.disabled, f"{label} is off"
    button.click().run()
    assert not tab.exception, [e.message for e in tab.exception]
    return tab


def button_is_off(tab: AppTest, label: str) -> bool:
    return bool(next(b for b in tab.button if b.label == label).disabled)


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_home_says_what_to_do_next(page: str, home: Home) -> None:
    tab = opened(page)
    assert "prefloop serve seen.yaml" in words(tab) or "prefloop train seen.yaml" in words(tab)


def test_the_overview_counts_each_step_and_names_what_blocks(ledger: Ledger, service: FakeService) -> None:
    for number in range(3):
        stage.add_response(ledger, number, origin="simulated" if number else "served")
    ledger.record_feedback(event_id="e", response_id="response-0", kind="edit", value="better")
    tab = opened()
    assert "2 simulated" in words(tab)
    assert "1 signals are not in a pair snapshot yet." in words(tab)
    assert "serves sft-000000000000" in words(tab)


def test_the_overview_names_the_champion_and_its_moves(ledger: Ledger, service: FakeService) -> None:
    stage.add_model(ledger, "sft-000000000000")
    stage.add_model(ledger, "seen-111111111111", verdict="SHIP")
    ledger.set_champion("default", "sft-000000000000", expected_revision=0, actor="test", reason="first")
    ledger.set_champion("default", "seen-111111111111", expected_revision=1, actor="test", reason="gate says SHIP")
    tab = opened()
    assert "seen-111111111111" in words(tab)
    assert "before it: sft-000000000000" in words(tab)
    assert "gate says SHIP" in set(tab.dataframe[0].value["why"])


def test_a_broken_recipe_shows_its_faults(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: seen\npears: {}\n")
    monkeypatch.setenv("PREFLOOP_RECIPE", str(broken))
    assert "did you mean `pairs`?" in words(opened())


def test_a_streamed_answer_names_its_model(service: FakeService) -> None:
    service.replies = ["Paris is the capital of France."]
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Capital of France?").run()
    assert "Paris is the capital of France." in words(tab)
    assert service.model_id in words(tab)
    assert service.asked[0]["messages"] == [{"role": "user", "content": "Capital of France?"}]
    assert service.asked[0]["stream"] is True
    assert all(a and a.startswith("Bearer pl-") for a in service.authorizations if a is not None)


def test_the_next_message_carries_the_conversation_so_far(service: FakeService) -> None:
    tab = opened("chat.py")
    tab.chat_input[0].set_value("First?").run()
    tab.chat_input[0].set_value("Second?").run()
    assert [m["role"] for m in service.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert service.asked[1]["metadata"]["conversation_id"] == service.asked[0]["metadata"]["conversation_id"]


def test_an_answer_that_breaks_off_is_not_kept(service: FakeService) -> None:
    service.finish_reason = None
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Anything?").run()
    assert "was cut off before its end" in words(tab)
    tab.run()
    assert "Answer number 1." not in words(tab)


def test_a_refusal_of_the_gateway_is_shown_in_its_words(service: FakeService) -> None:
    tab = opened("chat.py")
    service.fail_with = 429
    tab.chat_input[0].set_value("Anything?").run()
    assert "refused with 429: the test wants it so" in words(tab)


def test_a_thumb_down_with_reasons_reaches_the_gateway(service: FakeService) -> None:
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Anything?").run()
    tab.feedback[0].set_value(0).run()
    assert service.feedback[0]["kind"] == "thumb"
    assert service.feedback[0]["value"] == "down"
    tab.button_group[0].set_value(["wrong fact"]).run()
    press(tab, "Send reasons")
    assert service.feedback[1]["tags"] == ["wrong fact"]
    assert service.feedback[0]["event_id"] != service.feedback[1]["event_id"]
    assert service.feedback[0]["user"] == service.feedback[1]["user"]


def test_a_thumb_that_is_clicked_away_stays_because_it_was_sent_and_can_be_turned_over(service: FakeService) -> None:
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Anything?").run()
    tab.feedback[0].set_value(0).run()
    tab.feedback[0].set_value(None).run()
    assert tab.feedback[0].value == 0
    tab.feedback[0].set_value(1).run()
    assert [sent["value"] for sent in service.feedback] == ["down", "up"]


def test_an_edit_is_saved_as_the_better_answer_and_continues_the_conversation(service: FakeService) -> None:
    service.replies = ["Two and two is five."]
    tab = opened("chat.py")
    tab.chat_input[0].set_value("2 + 2?").run()
    press(tab, "Edit")
    tab.text_area[0].set_value("Two and two is four.").run()
    assert "- five." in words(tab)
    assert "+ four." in words(tab)
    press(tab, "Save as better answer")
    assert service.feedback[0]["kind"] == "edit"
    assert service.feedback[0]["value"] == "Two and two is four."
    tab.chat_input[0].set_value("Sure?").run()
    assert service.asked[1]["messages"][1]["content"] == "Two and two is four."


def test_an_unchanged_edit_is_not_sent(service: FakeService) -> None:
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Anything?").run()
    press(tab, "Edit")
    press(tab, "Save as better answer")
    assert "Nothing to save" in words(tab)
    assert not service.feedback


@pytest.mark.parametrize("side", ["Left better", "Right much better"])
def test_a_blind_comparison_names_models_only_after_the_verdict(service: FakeService, side: str) -> None:
    service.replies = ["The first answer.", "The second answer."]
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Which?").run()
    press(tab, "Regenerate and compare")
    shown = [t.value for t in tab.text if t.value.endswith("answer.")]
    assert sorted(shown) == ["The first answer.", "The second answer."]
    assert not any(t.value.startswith(service.model_id) for t in tab.main.text)
    press(tab, side)
    sent = service.comparisons[0]
    preferred = shown[0] if side.startswith("Left") else shown[1]
    winner = "A" if preferred == "The first answer." else "B"
    assert sent["verdict"] == winner + (">>" if "much" in side else ">") + ("B" if winner == "A" else "A")
    order = {"response-1": "The first answer.", "response-2": "The second answer."}
    assert [order[i] for i in sent["shown_order"]] == shown
    assert any(t.value.startswith(service.model_id) for t in tab.main.text)
    assert preferred in words(tab)


def test_the_edit_is_found_as_a_pair(home: Home, ledger: Ledger, service: FakeService) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1), stage.pair(2, source="thumbs", split="held_out")])
    tab = opened("pairs.py")
    rows = next(d.value for d in tab.dataframe if "rejected" in d.value)
    assert list(rows["source"]) == ["edit", "thumbs"]
    tab.selectbox[1].set_value("edit").run()
    rows = next(d.value for d in tab.dataframe if "rejected" in d.value)
    assert list(rows["source"]) == ["edit"]


def test_a_link_to_a_pair_opens_it(home: Home, ledger: Ledger) -> None:
    wanted = stage.pair(2)
    stage.add_pairs(home, ledger, [stage.pair(1), wanted])
    tab = opened("pairs.py", pair=wanted.pair_id)
    assert f"pair {wanted.pair_id}" in words(tab)
    assert "A better answer 2." in words(tab)


def test_dropped_rows_are_counted_by_reason(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)], dropped={"identical": 7, "cosmetic edit": 2})
    tab = opened("pairs.py")
    table = next(d.value for d in tab.dataframe if "reason" in d.value)
    assert dict(zip(table["reason"], table["count"], strict=True)) == {"identical": 7, "cosmetic edit": 2}
    assert "9" in [t.value for t in tab.text]


def test_the_funnel_leads_from_judgements_to_rows(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)])
    assert "9 judgements → 3 of these simulated → 1 candidate pairs" in words(opened("pairs.py"))


def test_an_imported_snapshot_is_shown_and_does_not_count_as_built(home: Home, ledger: Ledger) -> None:
    stage.add_response(ledger, 0)
    ledger.record_feedback(event_id="e", response_id="response-0", kind="edit", value="better")
    stage.add_pairs(home, ledger, [stage.pair(1, source="import")], origin={"kind": "import"}, counts={})
    assert "1 signals wait for the first snapshot" in words(opened("pairs.py"))
    assert "1 signals are not in a pair snapshot yet." in words(opened())


def test_a_snapshot_of_another_home_cannot_be_reached_by_its_path(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)])
    tab = opened("pairs.py", snapshot="../../../etc")
    assert tab.query_params["snapshot"] == "pairs-1"


def test_a_damaged_snapshot_is_named(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1)])
    Path(home.artifact("pairs", "pairs-1").part_uris()[0]).write_bytes(b"PAR1 no more")
    assert "pairs-1" in words(opened("pairs.py"))


def test_building_pairs_submits_the_fixed_job(home: Home, ledger: Ledger, service: FakeService) -> None:
    assert button_is_off(opened("pairs.py"), "Build pairs"), "there is nothing to build from"
    stage.add_response(ledger, 0)
    ledger.record_feedback(event_id="e", response_id="response-0", kind="edit", value="better")
    tab = press(opened("pairs.py"), "Build pairs")
    (job,) = service.jobs.values()
    assert " -m ray_jobs.build_pairs " in job["entrypoint"]
    assert job["entrypoint"].endswith("seen.yaml")
    assert job["runtime_env"] == {"env_vars": {"PREFLOOP_HOME": home.uri}}
    assert "Bearer token-of-the-cluster" in service.authorizations
    assert "log of prefloop-build-pairs" in words(tab)


def test_the_curves_of_a_run_are_shown_with_its_newest_step(ledger: Ledger) -> None:
    stage.add_run(ledger, "seen-aaaa", steps=12)
    tab = opened("runs.py")
    assert "step 12 of 12" in words(tab)
    assert len(tab.get("vega_lite_chart")) + len(tab.get("arrow_vega_lite_chart")) == 4


def test_what_a_run_measures_now_and_then_has_charts_of_its_own(ledger: Ledger) -> None:
    stage.add_run(ledger, "seen-cccc", steps=12)
    with ledger.write() as session:
        row = session.get_one(RunStepRow, ("seen-cccc", 6))
        row.metrics = {**row.metrics, "canary_finished": 0.5, "canary_repetition": 0.1, "held_out_accuracy": 0.6}
    tab = opened("runs.py", run="seen-cccc")
    assert len(tab.get("vega_lite_chart")) + len(tab.get("arrow_vega_lite_chart")) == 6
    assert any("Canaries" in caption.value for caption in tab.caption)


def test_a_failed_run_says_why(ledger: Ledger) -> None:
    stage.add_run(ledger, "seen-bbbb", status="failed", error="non-finite loss at step 3")
    assert "non-finite loss at step 3" in words(opened("runs.py", run="seen-bbbb"))


def test_a_model_that_passed_is_shipped_after_a_confirmation(ledger: Ledger, service: FakeService) -> None:
    stage.add_model(ledger, "sft-000000000000")
    ledger.set_champion("default", "sft-000000000000", expected_revision=0, actor="test", reason="first")
    stage.add_model(ledger, "seen-111111111111", verdict="SHIP")
    tab = opened("models.py", model="seen-111111111111")
    press(tab, "Ship")
    assert not service.jobs
    press(tab, "Ship it")
    (job,) = service.jobs.values()
    assert "-m ray_jobs.ship" in job["entrypoint"]
    assert "--model seen-111111111111 --actor dashboard:" in job["entrypoint"]
    tab.run()
    assert "Shipped: the next answer comes from the new champion." in words(tab)


def test_the_card_of_a_job_is_shown_until_it_is_dismissed(ledger: Ledger, service: FakeService) -> None:
    stage.add_model(ledger, "seen-111111111111", verdict="SHIP")
    tab = press(press(opened("models.py"), "Ship"), "Ship it")
    tab.run()
    press(tab, "Dismiss")
    assert "Shipped" not in words(tab)


def test_roll_back_submits_the_job_for_the_previous_model(ledger: Ledger, service: FakeService) -> None:
    for revision, name in enumerate(("sft-000000000000", "seen-111111111111")):
        stage.add_model(ledger, name)
        ledger.set_champion("default", name, expected_revision=revision, actor="test", reason="test")
    tab = press(press(opened("models.py"), "Roll back"), "Roll it back")
    (job,) = service.jobs.values()
    assert "--rollback" in job["entrypoint"]
    assert job["metadata"]["actor"].startswith("dashboard:")
    assert tab.session_state["rollback"] in service.jobs


@pytest.mark.parametrize("exit_code, said", [(3, "The gate holds this model."), (1, "failed with exit code 1")])
def test_a_job_that_does_not_ship_is_told_apart(
    exit_code: int, said: str, ledger: Ledger, service: FakeService
) -> None:
    service.job_end = {"status": "FAILED", "driver_exit_code": exit_code}
    stage.add_model(ledger, "seen-111111111111", verdict="SHIP")
    tab = press(press(opened("models.py"), "Ship"), "Ship it")
    tab.run()
    assert said in words(tab)


@pytest.mark.parametrize(
    "verdict, digest, said",
    [
        (None, None, "Only a model that passed the gate is shipped."),
        ("HOLD", None, "The gate holds it"),
        ("SHIP", "of other weights", "The verdict belongs to other weights"),
    ],
)
def test_ship_is_off_without_a_verdict_for_these_weights(
    verdict: str | None, digest: str | None, said: str, ledger: Ledger, service: FakeService
) -> None:
    row = stage.add_model(ledger, "seen-111111111111")
    if verdict is not None:
        with ledger.write() as session:
            session.add(stage.evaluation(row, verdict, **({"model_digest": digest} if digest else {})))
    tab = opened("models.py")
    assert button_is_off(tab, "Ship")
    assert said in words(tab)


def test_the_lineage_goes_from_the_model_to_the_judgements(home: Home, ledger: Ledger) -> None:
    stage.add_pairs(home, ledger, [stage.pair(1), stage.pair(2, source="thumbs")])
    stage.add_run(ledger, "seen-aaaa", steps=1, snapshot_id="pairs-1")
    stage.add_model(ledger, "sft-000000000000", kind="sft", created_at=now() - timedelta(hours=1))
    stage.add_model(
        ledger, "seen-111111111111", parent_id="sft-000000000000", run_id="seen-aaaa", snapshot_id="pairs-1"
    )
    lineage = words(opened("models.py"))
    for part in ("seen-111111111111", "run seen-aaaa", "pairs pairs-1", "2 judgements (1 edit, 1 thumbs)", "sft-0000"):
        assert part in lineage


def test_a_service_that_does_not_answer_is_said_so(home: Home) -> None:
    home.local().mkdir(parents=True)
    dead = {"gateway_url": "http://127.0.0.1:9", "ray_dashboard_url": "http://127.0.0.1:9"}
    home.local("services.json").write_text(json.dumps({**dead, "ray_address": "", "pid": 1}))
    tab = opened("chat.py")
    tab.chat_input[0].set_value("Anybody?").run()
    assert "cannot be reached" in words(tab)


def test_a_damaged_record_of_the_service_is_named(home: Home) -> None:
    home.local().mkdir(parents=True)
    home.local("services.json").write_text("{")
    assert "is damaged" in words(opened())


@pytest.mark.parametrize(
    "status, badge",
    [
        ("ok", "Gateway up"),
        ("switching", "Model is switching"),
        ("degraded", "degraded"),
        ("unavailable", "No replica"),
    ],
)
def test_the_sidebar_tells_the_state_of_the_gateway(service: FakeService, status: str, badge: str) -> None:
    service.health_status = status
    assert any(badge in m.value for m in opened().sidebar.markdown)
