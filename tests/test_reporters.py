"""Reporters that the Trainer knows and this package does not: their scalars, checked in a local MLflow."""

from __future__ import annotations

import numpy as np
import pytest

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("transformers")

from incoherence_monitor import IncoherenceCallback

from .test_callback import CONFIG, make_trainer


def test_mlflow_gets_every_scalar_at_the_step_of_its_sample(tmp_path, monkeypatch):
    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store)
    callback = IncoherenceCallback(every=2, config=CONFIG)
    make_trainer(tmp_path / "out", callback=callback, steps=12, report_to=["mlflow"]).train()
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient(store)
    # One run: the last sample came before the Trainer ended it, and nothing after that opened another.
    [run] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert not callback.monitor.coverage().failures
    names = {"incoherence/alerts", "incoherence/armed", "incoherence/cost/share", "loss"}
    assert names <= set(run.data.metrics)
    points = client.get_metric_history(run.info.run_id, "incoherence/key_incoherence/median")
    assert {point.step: pytest.approx(point.value, rel=1e-6) for point in points} == dict(
        zip(range(0, 12, 2), np.median(callback.monitor.history.values("key_incoherence"), axis=1), strict=True)
    )
