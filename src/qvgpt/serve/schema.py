"""What requests may say, each field with its bounds; anything else is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 64
"""Texts of one request: its prompts times n."""
_LIMIT = 1e6

Number = Annotated[float, Field(ge=-_LIMIT, le=_LIMIT, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=_LIMIT, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=10_000_000)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 17)]
Few = Annotated[int, Field(ge=0, le=20)]


class Strict(BaseModel):
    """Unknown fields are faults, and numbers are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)


class GuidanceFields(Strict):
    """How values guide: the fields of `qvgpt.Guidance`. What is left out has its default there, so
    that {"beta": 0} is the plain model."""

    beta: Number | None = Field(None, description="Strength, in 1 / units of reward.")
    temperature: Temperature | None = Field(None, description="0 is greedy.")
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    top_p: Share | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    candidates: Literal["base", "guided"] | None = None
    twins: Literal["mean", "min"] | None = None
    functional: Literal["mean", "soft", "cvar"] | None = None
    alpha: Share | None = None
    beta_end: Number | None = None
    beta_tokens: Annotated[int, Field(ge=0, le=_LIMIT)] | None = None
    kl_budget: Positive | None = Field(None, description="In the place of beta; needs top_k.")
    beta_max: Positive | None = None


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool | None = None


class Sampled(Strict):
    """What both kinds of completion take."""

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="null: what the context holds, at most 256."
    )
    temperature: Temperature | None = Field(None, description="null: that of the guidance.")
    top_p: Share | None = Field(None, description="null: that of the guidance.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    guidance: GuidanceFields | None = Field(None, description="null: what the model recommends.")
    values: bool | Few | None = Field(
        False, description="Values of every token; a number: so many of the likeliest beside it."
    )
    user: Annotated[str, Field(max_length=512)] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _whole_zero(cls, fields: Any) -> Any:
        """Penalties of 0.0 are 0."""
        if isinstance(fields, dict):
            for name in ("frequency_penalty", "presence_penalty"):
                if isinstance(fields.get(name), float) and fields[name] == 0:
                    fields = {**fields, name: 0}
        return fields

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are told as values; None: no values."""
        if self.values is None or self.values is False:
            return None
        return 0 if self.values is True else self.values


class CompletionRequest(Sampled):
    """`/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Few | None = None
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Message(Strict):
    """A message of a dialogue; what answers hold besides is taken where it says nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=1024)]
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Not read.")
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    def as_row(self) -> dict[str, Any]:
        """As templates read it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampled):
    """`/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = False
    top_logprobs: Few | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None


class ValuesRequest(Strict):
    """`/v1/values`: a text, a prompt with its completion, or a dialogue."""

    model: Annotated[str, Field(max_length=256)] | None = None
    text: Text | None = None
    prompt: Text | None = None
    completion: Text | None = None
    messages: Messages | None = None
    ended: bool = Field(False, description="Whether an end token follows, to be judged too.")
    alternatives: Few = 0
    guidance: GuidanceFields | None = Field(None, description="null: what the model recommends.")


class Fault(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Fault
