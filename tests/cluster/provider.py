"""Processes of this machine for an autoscaler's machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Ray's own, but each node has a folder in `folder`: in a shared one, the first to go removes the jobs of all."""

    def _create_node_with_resources_and_labels(self, *arguments: Any, **named: Any) -> None:
        def params(**options: Any) -> parameter.RayParams:
            return original(**options, temp_dir=str(folder))

        original = parameter.RayParams
        folder = Path(self.provider_config["folder"], str(self._next_node_id))
        with mock.patch.object(parameter, "RayParams", params):
            super()._create_node_with_resources_and_labels(*arguments, **named)
