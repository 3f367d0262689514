"""vLLM's schedulers, which ask less of the cache, and whose prefills stop exactly where a slot is wanted.

With drafted tokens they are vLLM's but for three things, see `Bounded`, `Sessions` and `Drafting`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_bamba.config import BambaShape
from vllm_bamba.prefix.managers import OnlyWhereDue
from vllm_bamba.prefix.options import SlotOptions, active, shared_tokens, system_tokens, unit_of
from vllm_bamba.prefix.policy import PREFILLS, chunk_tokens, inner_position, plan_prefill
from vllm_bamba.prefix.slots import Slots
from vllm_bamba.step_options import slot_format


class Sessions(Scheduler):
    """Computes a streaming session again where its states are ahead of its text; prefixes that are cached are hit.

    A session drops its answer's last token when more of the prompt comes. A step that was in flight when that token
    ended the answer has put it into the states, and states cannot be rewound as keys can. With drafts they may be ahead
    in any case, and the worker does not remember by how much.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ahead: set[str] = set()  # such sessions, until they are scheduled again

    def _handle_stopped_request(self, request: Request) -> bool:
        if request.resumable and (request.num_output_placeholders > 0 or self.num_spec_tokens > 0):
            self.ahead.add(request.request_id)
        return super()._handle_stopped_request(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        again = session.request_id in self.ahead
        if again:  # before the answer becomes a part of the prompt, so that it leaves what others' answers leave
            self._free_request_blocks(session)
        super()._update_request_as_session(session, update)
        if again:
            session.num_computed_tokens = 0

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's; the worker forgets where the states of such sessions are, as it does of preempted requests.

        It is told in every step: one without tokens it may not look at.
        """
        if self.ahead:
            scheduler_output.preempted_req_ids = self.ahead | (scheduler_output.preempted_req_ids or set())
            self.ahead -= scheduler_output.num_scheduled_tokens.keys() | scheduler_output.finished_req_ids
        super()._update_after_schedule(scheduler_output)


class Bounded(Scheduler):
    """Begins no more prefills in a step than memory is set aside for (`mixing.Mixing.reserve`)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prefills: set[str] = set()  # of the step that is being scheduled

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.prefills.clear()
        return super().schedule(*args, **kwargs)

    def takes_prefill(self, request: Request) -> bool:
        """Whether this step may prefill the request, too."""
        if len(self.prefills) < PREFILLS:
            self.prefills.add(request.request_id)
        return request.request_id in self.prefills


class Sparing(Sessions, Bounded):
    """Asks the groups of the cache only where one has something to do."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.due = OnlyWhereDue(self.kv_cache_manager, self.takes_prefill)

    def _free_request_blocks(self, request: Request) -> None:
        self.due.forget(request)
        super()._free_request_blocks(request)


class SparingAsync(Sparing, AsyncScheduler):
    """The next step is scheduled while one runs."""


class PrefixAware(Sparing):
    """With slots."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.slots = self.due.slots = Slots.of(self.kv_cache_manager.block_pool)
        self.slots.limit(SlotOptions.of(self.vllm_config).share)
        form = slot_format(self.vllm_config, BambaShape.from_hf(self.vllm_config.model_config.hf_config))
        self.slots.anchored = form is not None and form.anchored
        self.slots.columns = -(-self.max_model_len // self.slots.states[0].block_size)

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of this step's chunk, 0 where the request has to wait.

        Unlike vLLM's it need not end on a block's last token: `BambaStateManager` keys what does and nothing else.
        """
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        known = self.slots.requests[request.request_id]
        prefilled = max(request.num_prompt_tokens, request.num_tokens - 1)
        if request.num_computed_tokens == 0 or start < prefilled:
            known.prefilled = prefilled
        if start >= prefilled:
            return num_new_tokens
        if not self.takes_prefill(request):
            return 0
        unit, is_new = unit_of(self.vllm_config), request.num_computed_tokens == 0
        if is_new:
            known.plan = plan_prefill(
                request.num_tokens,
                start,
                junction=request.shared_prefix_boundary,
                hint=shared_tokens(request.sampling_params),
                system=system_tokens(request.sampling_params),
                unit=unit,
                roomy=self.slots.table.roomy,
            )
        end, plan = start + num_new_tokens, known.plan
        roomy = self.slots.room_inside(request.request_id, end, copies=is_new and start > 0)
        if is_new and plan and self.running and not roomy:
            return 0  # it would come to its first slot, and be preempted there
        kept = inner_position(start, end, unit) if roomy else 0
        tokens = chunk_tokens(start, num_new_tokens, plan, kept)
        self.slots.keeps_inside(request.request_id, kept if tokens == num_new_tokens and kept in plan else 0)
        return tokens

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.slots.withdraw(request.request_id, self.slots.text.keyed_in_this_step(request.request_id))
        super()._preempt_request(request, *args, **kwargs)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """As vLLM's: after an answer more of the prompt has come, and the request is scheduled as a new one."""
        for states in self.slots.states:
            states.stand_at(session.request_id, session.num_computed_tokens)
        super()._update_request_as_session(session, update)

    def _free_request_blocks(self, request: Request) -> None:
        """As vLLM's, but first an anchored answer's last unit is made to be found."""
        if unit := self.slots.unit_left(request):
            self.kv_cache_manager.cache_blocks(request, min(unit, request.num_tokens))
            self.slots.leave(request, unit)
        super()._free_request_blocks(request)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self.slots.clear()
        return done


class PrefixAwareAsync(PrefixAware, AsyncScheduler):
    """The next step is scheduled while one runs."""


class Drafting(Sessions, Bounded):
    """A prompt of one token, which comes while others decode, gets no placeholders of drafts.

    vLLM pads it with them, so that all have as many tokens. But what has no state yet is a prefill, and nobody takes
    the placeholders out of its state again.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aligns: bool = self.need_mamba_block_aligned_split  # type: ignore[has-type]
        self.need_mamba_block_aligned_split = True  # the next function is asked; padding that it cuts is dropped

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """As vLLM's if that is wanted; in either case no more of a request's first tokens than there are.

        0 where the request has to wait.
        """
        if request.num_computed_tokens == 0 and not self.takes_prefill(request):
            return 0
        found = (num_new_local_computed_tokens, num_external_computed_tokens)
        if self.aligns:
            num_new_tokens = super()._mamba_block_aligned_split(request, num_new_tokens, *found)
        is_first = request.num_computed_tokens + sum(found) == 0
        return min(num_new_tokens, request.num_tokens) if is_first else num_new_tokens


class DraftingAsync(Drafting, AsyncScheduler):
    """The next step is scheduled while one runs."""


KINDS = {  # whether there are slots, whether steps overlap
    (False, False): Sparing,
    (False, True): SparingAsync,
    (True, False): PrefixAware,
    (True, True): PrefixAwareAsync,
}


def build(vllm_config: Any, **kwargs: Any) -> Sparing:
    """The scheduler for this configuration; vLLM's `scheduler_cls` names this function."""
    kind = KINDS[active(vllm_config), bool(vllm_config.scheduler_config.async_scheduling)]
    return kind(vllm_config=vllm_config, **kwargs)


def build_drafting(vllm_config: Any, **kwargs: Any) -> Drafting:
    """The same with drafted tokens."""
    kind = DraftingAsync if vllm_config.scheduler_config.async_scheduling else Drafting
    return kind(vllm_config=vllm_config, **kwargs)
