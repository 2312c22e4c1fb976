"""Write `docs/reference/metrics.md` from the declared metrics.

    python tools/metrics_page.py [FILE]

A test fails when the page is not what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vfiouser_oob.observability.measured import BOUNDS_S
from vfiouser_oob.observability.openmetrics import METRICS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "metrics.md"
HEAD = """# Metrics

<!-- Written by `make pages` from the declarations in vfiouser_oob/observability/openmetrics.py; edit those. -->

The daemon always counts and measures. To publish the figures, install the extra: `pip install 'vfiouser-oob[metrics]'`.

* `vfiouser-oob metrics` prints everything once, for a text-file collector or for people.
* With `metrics_socket = "/run/vfiouser-oob/metrics.sock"` in [`[daemon]`](configuration.md#daemon), the daemon answers
  `GET /metrics` there: `curl --unix-socket /run/vfiouser-oob/metrics.sock http://localhost/metrics`. The socket has
  mode 0660, for the daemon's user and group.
* For a TCP port use systemd, because the daemon itself has no network. Anybody who reaches the port can read it:

  ```ini
  # /etc/systemd/system/vfiouser-oob-metrics.socket
  [Socket]
  ListenStream=127.0.0.1:9753
  FileDescriptorName=metrics
  Service=vfiouser-oob.service

  [Install]
  WantedBy=sockets.target
  ```

The daemon answers only `GET` and `HEAD` of `/metrics`. It answers one request per connection, serves eight connections
at a time, and ends each after ten seconds at most. It renders the figures at most once a second. A dashboard is in
`packaging/grafana/vfiouser-oob.json`.

Counters start at 0 with the daemon. Only `vfiouser_oob_starts_total` continues, from the
[`state_directory`](configuration.md#daemon).

"""


def page() -> str:
    """The whole page."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        lines.append(f"| `{metric.published}` | {metric.kind.value} | {labels} | {metric.text} |")
    bounds = ", ".join(f"{bound:.3g}" for bound in BOUNDS_S)
    lines += ["", f"Buckets of the histogram end at {bounds} seconds.", ""]
    return HEAD + "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page())
