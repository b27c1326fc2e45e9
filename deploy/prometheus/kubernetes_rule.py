"""Prints the rules here as one resource of the Prometheus operator: deploy/kubernetes/monitoring/rules.yaml.

`make reference` renews that file.
"""

from __future__ import annotations

from pathlib import Path

RULES = Path(__file__).parent / "rules"
HEAD = """\
# Written by deploy/prometheus/kubernetes_rule.py from deploy/prometheus/rules; `make reference` renews it.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: distributor-node
  labels: {app.kubernetes.io/name: distributor-node}
spec:
  groups:
"""


def prometheus_rule() -> str:
    """The groups of all files, comments included, two levels deeper."""
    lines = []
    for path in sorted(RULES.glob("*.yml")):
        _, _, groups = path.read_text().partition("groups:\n")
        lines += [f"  {line}".rstrip() for line in groups.splitlines()]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(prometheus_rule(), end="")
