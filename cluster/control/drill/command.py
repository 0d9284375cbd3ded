"""A drill from beginning to end: config, names and options in; progress, a table or JSON, and an exit status out."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from cluster.config.schema import ClusterConfig
from cluster.control.drill.client import Client
from cluster.control.drill.drill import Drill
from cluster.control.drill.phase import Options, Scenario
from cluster.control.drill.scenarios import SCENARIOS, chosen
from cluster.control.drill.site import Site
from cluster.control.drill.table import results_json, results_view, scenarios_view
from cluster.control.report import Report, report_to
from cluster.control.samples import base_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What would be played, and where; nothing has been done yet."""

    site: Site
    scenarios: Sequence[Scenario]
    options: Options

    @property
    def model(self) -> str:
        """The model that is asked and hurt."""
        return self.site.model

    @property
    def names(self) -> list[str]:
        """Names of the scenarios."""
        return [scenario.name for scenario in self.scenarios]


def show_scenarios() -> None:
    """Print what there is to play."""
    Console().print(scenarios_view(SCENARIOS))


def prepare(config: ClusterConfig, model: str | None, names: list[str], options: Options) -> Prepared:
    """Check what was asked for; UsageError where there is no such model or scenario."""
    return Prepared(site=Site(config, model), scenarios=chosen(names), options=options)


def play(prepared: Prepared, *, as_json: bool) -> int:
    """Play everything and print what it showed, also when interrupted; 1 when a promise was broken."""
    report = report_to()
    drill: list[Drill] = []
    try:
        asyncio.run(_play(prepared, report, drill))
    finally:
        report.close()
        if drill:
            _print(drill[0], prepared.model, as_json=as_json)
    return 0 if all(result.kept for result in drill[0].results) else 1


async def _play(prepared: Prepared, report: Report, drill: list[Drill]) -> None:
    async with Client(base_url(prepared.site.config)) as client:
        drill.append(Drill(prepared.site, client, report, prepared.options))
        await drill[0].run(prepared.scenarios)


def _print(drill: Drill, model: str, *, as_json: bool) -> None:
    if as_json:
        found = results_json(drill.results, drill.notes, model)
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif drill.results:
        Console().print(results_view(drill.results, drill.notes))
