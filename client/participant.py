"""One site's part in one study: prepare, train a round, keep the final model.

The order of every step is the promise: policy, then ledger, then data, then the durable reply, then its release.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gapweave.client.capability import Capability, stated
from gapweave.client.data import Cohort, load_cohort
from gapweave.client.device import find_device
from gapweave.client.evaluation import ReleasedModel, score_table, table_answer
from gapweave.client.learner import Learner
from gapweave.client.ledger import Ledger
from gapweave.client.network import Networks
from gapweave.client.policy import check_guarantee, check_policy, check_size
from gapweave.client.preparation import Preparation, noised_counts
from gapweave.client.requests import LARGEST, check_groups, check_open, check_round, check_same_model
from gapweave.client.setting import run_setting
from gapweave.client.sources.findings import Finding
from gapweave.client.state import Groups, RoundState, RunFolder, read_model, to_tensors
from gapweave.client.trial import try_model
from gapweave.shared.config import Site, Study
from gapweave.shared.constants import Constants
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.messages import split_corrections
from gapweave.shared.model import MultimodalModel, groups
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.head import Head
from gapweave.shared.privacy.ledger import LedgerView
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch
from gapweave.shared.tensorfile import Arrays


class Participant:
    """A site in a study.

    Args:
        study: what all sites agree on.
        site: the hospital's own file, already read.
        site_file: where it was read from; relative paths start there.
        state: the site's state folder.
        data_dir: folder of data sets, if one was given.
        simulation: whether this is a virtual site.
        anchored: whether the site file's anchor counts: not where the state is one run's own.
        networks: models that sites of this process share; None for a site of its own.
    """

    def __init__(
        self,
        study: Study,
        site: Site,
        *,
        site_file: Path,
        state: Path,
        data_dir: Path | None = None,
        simulation: bool = False,
        anchored: bool = True,
        networks: Networks | None = None,
    ) -> None:
        self.study, self.site = study, site
        self._site_file, self.state, self._data_dir = site_file, state, data_dir
        self._simulation = simulation
        anchor = site.policy.anchor if anchored else None
        self._anchor = None if anchor is None else site_file.parent / anchor
        self.findings: list[Finding] = []
        self.held = site.held(study)
        self.device = find_device(site.device, site_file)
        self.learner = Learner(study, site.name, self.held, self.device, lambda: self.training, networks)
        self._checked: LedgerView | None = None
        self._plans: dict[str, tuple[Plan, Constants]] = {}

    @cached_property
    def cohort(self) -> Cohort:
        """The site's records; what is odd about them goes to `findings`."""
        return load_cohort(
            self.study, self.site, site_file=self._site_file, data_dir=self._data_dir, findings=self.findings
        )

    @cached_property
    def training(self) -> Batch:
        """Records of the training patients, on the site's device."""
        return self.cohort.training().to(self.device)

    @property
    def initial(self) -> Groups:
        """The public initial parameters."""
        return self.learner.initial

    @property
    def shared(self) -> list[str]:
        """Groups that this site sends and receives."""
        return self.learner.shared

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The site's ledger, held while in use; a simulation without noise checks each entry of it once."""
        with Ledger(self.state, self.site, self._anchor, durable=self._durable, checked=self._checked) as ledger:
            yield ledger
            self._checked = None if self._durable else ledger.view

    def prepare(self, run: str, echo: Head | None = None) -> Capability:
        """Check the policy, fix n_hat, plan the noise, and reserve what the cap allows.

        Args:
            run: our own id of the run.
            echo: the ledger's head as the server remembers it.

        Raises:
            RefusedError: when policy or budget do not allow a single round.
            DataError: when the data cannot be used.
        """
        check_policy(self.study, self.site, simulation=self._simulation)
        if not self._simulation:  # which has tried the model once for all its sites
            try_model(self.study, self.held, self.device)
        with self.ledger() as ledger:
            ledger.check_echo(echo)
            by = "simulation" if self._simulation else "policy.studies"
            check_guarantee(self.study, self.site, ledger.view)
            ledger.approve(self.study.sha256, self.study.name, by)
            self._require_room(ledger, run)
            plan = self._plan(ledger, run)
            self._require_patients(ledger, run)  # data that cannot be used leave no reservation behind
            setting = run_setting(self.site, self.held, self.shared, self.initial)
            may_stop = self.study.training.early_stop is not None
            reserved = ledger.reserve(run, self.study.sha256, plan.schedule(), setting, may_stop=may_stop)
        return Capability(
            site=self.site.name,
            modalities=self.held,
            groups=self.shared,
            rounds=min(reserved, plan.rounds),
            plan=stated(plan),
            ledger=ledger.view.head.to_dict(),
        )

    def _require_room(self, ledger: Ledger, run: str) -> None:
        """Refuse a study that the cap has no room for before it costs anything; what is asked here is public."""
        if ledger.view.reservation(run) is None:
            self._preparation(ledger).require_room(ledger, run)

    def _require_patients(self, ledger: Ledger, run: str) -> None:
        """Refuse a study that the site has too few patients for, and give back what an earlier handshake reserved."""
        try:
            check_size(self.training.patients, self.site)
        except RefusedError:
            ledger.finish(run)
            raise

    def _plan(self, ledger: Ledger, run: str) -> Plan:
        """What the site does in this study, from public and released numbers; the learner gets the model's constants.

        The ledger holds what a run's plan follows from, so that it is the same for the whole run.
        """
        if run not in self._plans:
            preparation = self._preparation(ledger)
            n_hat, counted = preparation.patients(ledger, run, lambda: self.training)
            constants = preparation.constants(ledger, run, lambda: self.training)
            self._plans[run] = preparation.plan(n_hat, counted), constants
        plan, self.learner.constants = self._plans[run]
        return plan

    def _preparation(self, ledger: Ledger) -> Preparation:
        return Preparation(self.study, self.site, self.held, min(self.study.privacy.delta, ledger.view.delta))

    def train(self, run: str, number: int, request: str, received: Arrays) -> RoundState:
        """Train one round, or give the stored reply to a request that was answered before.

        Args:
            run: our own id of the run.
            number: of the round, from 1.
            request: hash of the whole request.
            received: the shared groups, and with SCAFFOLD corrections of some of them.

        Returns:
            The state after the round; its `reply` is what may leave.

        Raises:
            RefusedError: for a round already done with another request, foreign groups, or an exhausted budget.
        """
        check_policy(self.study, self.site, simulation=self._simulation)
        folder = self.folder(run)
        with self.ledger() as ledger:
            before = folder.load()  # one message at a time: another process may just have answered this one
            ledger.require_charged(before.request)
            if before.request == request:
                ledger.released(request)
                return before if before.reply else self._again(ledger, run, number, before, received)
            check_open(ledger.view, run)
            check_round(number, before.round, self.study.training.rounds)
            self._check_round(received)
            plan = self._plan(ledger, run)
            event = plan.event(f"update of round {number}")
            check_size(self.training.patients, self.site)  # read before it is charged: data that are gone cost nothing
            ledger.charge(run, self.study.sha256, request, event)
            trained = self.learner.round(plan, number, request, before, received)
            after = replace(trained, ledger=ledger.view.head.to_dict())
            folder.save(replace(after, reply={}) if self._repeatable(after) else after)
            ledger.released(request)
        return after

    def folder(self, run: str) -> RunFolder:
        """The site's files of a run."""
        return RunFolder(self.state, run, durable=self._durable)

    @property
    def _durable(self) -> bool:
        """Whether what is written must survive a power cut: always, but for simulations without noise."""
        return self.study.privacy.enabled or not self._simulation

    def _repeatable(self, after: RoundState) -> bool:
        """Whether a round's reply follows from its request alone: seeded draws, and no state that stayed here."""
        return not self._durable and not after.private and not after.momentum

    def _again(self, ledger: Ledger, run: str, number: int, before: RoundState, received: Arrays) -> RoundState:
        self._check_round(received)
        trained = self.learner.round(self._plan(ledger, run), number, before.request, before, received)
        return replace(trained, ledger=before.ledger)

    def _check_groups(self, received: Arrays) -> None:
        check_groups(received, {group: self.initial[group] for group in self.shared}, self._largest)

    def _check_round(self, received: Arrays) -> None:
        shared, corrections = split_corrections(received)
        self._check_groups(shared)
        corrected = self.shared if self.study.training.scaffold else []
        known = {group: self.initial[group] for group in corrected if group in corrections}
        check_groups(corrections, known, self._largest)

    @property
    def _largest(self) -> float:
        return LARGEST if self.study.privacy.enabled else math.inf

    def assemble(self, run: str, received: Arrays) -> MultimodalModel:
        """The site's model from its private groups after the last round and the given shared ones."""
        if run not in self._plans:  # another process trains this virtual site: learn what constants it uses
            with self.ledger() as ledger:
                self._plan(ledger, run)
        return self.learner.load(RunFolder(self.state, run).load(), to_tensors(received))

    def evaluate(self, run: str, request: str, received: Arrays, after: int | None = None) -> Mapping[str, Any]:
        """Tell how well a released model does, as a noised table of counts; the same request again, the same table.

        Args:
            run: our own id of the run.
            request: hash of the whole request.
            received: the model's shared groups.
            after: number of the round that it is looked at after; None for the final model.

        Returns:
            The table with its event, or why there is none.

        Raises:
            RefusedError: by policy, for other groups than those that the site shares, for a run without a round or
                that is over, or for a second table of a run.
        """
        check_policy(self.study, self.site, simulation=self._simulation)
        self._check_groups(received)
        with self.ledger() as ledger:
            trained = RunFolder(self.state, run).load()
            ledger.require_charged(trained.request)
            event = self._plan(ledger, run).scores(after)
            if isinstance(event, str):
                return {"table": None, "reason": event}
            value = ledger.kept(request) or self._table(ledger, run, request, event, trained, received)
            ledger.released(request)
        return table_answer(event, value)

    def _table(
        self, ledger: Ledger, run: str, request: str, event: PrivacyEvent, trained: RoundState, received: Arrays
    ) -> list[float]:
        """Charge, then count, then keep. What needs no patient comes first: its refusal costs nothing."""
        if trained.round == 0:
            raise RefusedError("this run trained nothing here", where=self.site.name, remedy="Train a round first")
        check_open(ledger.view, run)
        model = self._released(ledger, trained, received)
        ledger.charge(run, self.study.sha256, request, event)
        table = score_table(model, self.cohort.testing())
        value = noised_counts(table.ravel().tolist(), event)
        ledger.keep(request, value)
        return value

    def _released(self, ledger: Ledger, trained: RoundState, received: Arrays) -> ReleasedModel:
        """The final model, anew from what the ledger paid for: the learner's may have been fine-tuned meanwhile."""
        return ReleasedModel(
            self.study,
            initial=self.initial,
            trained=trained,
            received=received,
            constants=self.learner.constants,
            ledger=ledger,
        )

    def finish(self, run: str, received: Arrays) -> None:
        """Keep the whole model for prediction, fine-tune it if the study says so, and give back the reservation.

        Args:
            run: our own id of the run.
            received: the final shared groups.

        Raises:
            RefusedError: by policy, for other groups than those that the site shares, for a run without a round,
                or for a second model after the last one.
        """
        check_policy(self.study, self.site, simulation=self._simulation)
        self._check_groups(received)
        folder = self.folder(run)
        with self.ledger() as ledger:
            if folder.load().round == 0:
                raise RefusedError("this run trained nothing here", where=self.site.name, remedy="Train a round first")
            if ledger.view.given_up(run):
                check_open(ledger.view, run)
            if ledger.view.closed(run):
                check_same_model(read_model(folder.path / "model.safetensors")[0], received)
                return
            self._plan(ledger, run)  # gives the model its constants; what they cost was paid before
            folder.save_model("model", groups(self.assemble(run, received)), self._card())
            if self.study.training.finetune:
                self._finetune(ledger, run, folder)
            ledger.finish(run)

    def _finetune(self, ledger: Ledger, run: str, folder: RunFolder) -> None:
        """Train on from the final model; the copy is terminal, no release path opens it."""
        if (folder.path / "finetuned.safetensors").exists():
            return  # a repeated last message: training again would be a second release under one charge
        plan = self._plan(ledger, run)
        event = plan.event("fine-tuning", plan.finetune_steps)
        request = hashlib.sha256(f"{run}/fine-tuning".encode()).hexdigest()
        try:
            ledger.charge(run, self.study.sha256, request, event)
        except BudgetExhausted:
            return
        gate = self.learner.fine_tune(plan, self.cohort.training_ids())
        folder.save_model("finetuned", groups(self.learner.model), {**self._card(), "gate": asdict(gate)})

    def _card(self) -> dict[str, Any]:
        """What prediction needs beside the parameters; it stays at the site."""
        data = self.training
        patterns = torch.unique(data.present, dim=0).tolist()
        names = [[name for name, here in zip(self.study.order, row, strict=True) if here] for row in patterns]
        return {
            "site": self.site.name,
            "study": self.study.model_dump(mode="json"),
            "modalities": self.held,
            "prior": data.prevalence(),
            "patterns": sorted({"+".join(pattern) for pattern in names if pattern}),
            "constants": self.learner.constants.to_dict(),
        }
