"""Save a Weights & Biases workspace with the monitor's panels, in the order in which one reads them.

    pip install wandb-workspaces
    python wandb_workspace.py ENTITY PROJECT

It is built without a network; saving it asks W&B. Panels show runs of the project that are still to come, too.
"""

from __future__ import annotations

import sys

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from incoherence_monitor.stats import DEFAULT_RECORDED, statistic
from incoherence_monitor.trackers import sections

STEP = "incoherence/step"


def build(entity, project):
    found = []
    for section in sections(statistic(name) for name in DEFAULT_RECORDED):
        charts = []
        for panel in section.panels:
            metrics = {"metric_regex": panel.metrics[0]} if panel.shape == "pattern" else {"y": list(panel.metrics)}
            charts.append(panels.LinePlot(title=panel.title, x=STEP, **metrics))
        found.append(workspaces.Section(name=section.title, panels=charts, is_open=not found))
    pictures = ["incoherence/drift_map", "incoherence/heads_map", "incoherence/alert_text"]
    media = [panels.MediaBrowser(title=key.partition("/")[2], media_keys=[key], num_columns=1) for key in pictures]
    media.append(panels.WeavePanelSummaryTable(table_name="incoherence/drifting_table"))
    found.insert(1, workspaces.Section(name="Which heads", panels=media, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name="Attention heads", sections=found)


if __name__ == "__main__":
    workspace = build(*sys.argv[1:3])
    workspace.save()
    print(workspace.url)
