"""Whether a judge may decide: one that labelled what a candidate learned from, or learned from the same, agrees with it.

Who labelled pairs is what `prefloop import --judge` said of them; it counts for every model that descends from a run on
them. What a model learned from is every pair of every run in its line, by what the pair says and not by the snapshot it
stood in. People, and the demo's simulated audience, are no judges. This module trusts the names that it is given.
"""

from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.evaluation.metrics import Metric, plain
from app.ledger import Ledger, ModelRow, RunRow, SnapshotRow
from app.storage import Home

_NAME = "judge.independent"


def independence(home: Home, ledger: Ledger, judge: str, candidate_id: str) -> Metric:
    """Return 1 where a judge has nothing to do with what the candidate learned from, else 0 and why.

    Args:
        home: where pair snapshots lie.
        ledger: knows the lines of the models.
        judge: its name; where it is the id of a model of the home, what that model learned from counts too.
        candidate_id: the candidate.
    """
    with ledger.read() as session:
        candidate = list(_line(session, candidate_id))
        fault = _labelled(judge, candidate)
        if not fault and session.get(ModelRow, judge) is not None:
            fault = _shared(home, judge, list(_line(session, judge)), candidate_id, candidate)
    return plain(_NAME, float(not fault), 1, fault)


_Line = Sequence[tuple[ModelRow, list[SnapshotRow]]]


def _labelled(judge: str, candidate: _Line) -> str:
    for _, snapshots in candidate:
        for pairs in snapshots:
            labeller = pairs.manifest.get("origin", {}).get("judge")
            if labeller and _plain(labeller) == _plain(judge):
                return f"the judge `{judge}` labelled pairs that the candidate learned from (snapshot `{pairs.snapshot_id}`)"
    return ""


def _shared(home: Home, judge_id: str, judge: _Line, candidate_id: str, candidate: _Line) -> str:
    lines = [[model.model_id for model, _ in line] for line in (judge, candidate)]
    if judge_id in lines[1] or candidate_id in lines[0]:
        return f"the judge `{judge_id}` and the candidate `{candidate_id}` descend from one another"
    # What both descend from says nothing of either.
    common = {*lines[0]} & {*lines[1]}
    own = [
        {pairs.snapshot_id for model, snapshots in line if model.model_id not in common for pairs in snapshots}
        for line in (judge, candidate)
    ]
    same = len(_pair_ids(home, own[0]) & _pair_ids(home, own[1]))
    if same or own[0] & own[1]:
        return f"the judge `{judge_id}` learned from {same or 'the same'} of the candidate's pairs"
    return ""


def _pair_ids(home: Home, snapshot_ids: set[str]) -> set[str]:
    """Return the pairs of these snapshots; of one that is not in the home any more nothing is known."""
    found: set[str] = set()
    for snapshot_id in snapshot_ids:
        artifact = home.artifact("pairs", snapshot_id)
        for path in artifact.part_uris():
            with artifact.filesystem.open(path, "rb") as stream:
                found.update(pq.read_table(stream, columns=["pair_id"])["pair_id"].to_pylist())
    return found


def _line(session: Session, model_id: str) -> Iterator[tuple[ModelRow, list[SnapshotRow]]]:
    """Yield a model and all models before it, each with the pair snapshots of the runs that made it.

    Equal weights of several runs are one model, whose row names the first of them only.
    """
    model = session.get(ModelRow, model_id)
    while model is not None:
        runs = session.scalars(sa.select(RunRow.snapshot_id).where(RunRow.output_model_id == model.model_id)).all()
        named = dict.fromkeys(name for name in (model.snapshot_id, *runs) if name)
        training = [row for name in named if (row := session.get(SnapshotRow, name)) is not None]
        pairs = [session.get(SnapshotRow, row.parent_id) for row in training if row.parent_id]
        yield model, [row for row in pairs if row is not None]
        model = session.get(ModelRow, model.parent_id) if model.parent_id else None


def _plain(name: str) -> str:
    """Return a name without its owner and without case: neither makes another model."""
    return name.rsplit("/", 1)[-1].casefold()
