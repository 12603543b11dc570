"""What every section of a recipe is made of: closed frozen models, amounts as text, and `auto`."""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from .quantities import Bytes, Count, Every, Joules, Money, Price, Seconds

T = TypeVar("T")


class Section(BaseModel):
    """One section: unknown keys are errors, values are not converted in silence, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,
    )


@dataclass(frozen=True)
class _Automatic:
    """Accepts the word `auto` for None: the plan decides. Written back as `auto`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wrap the schema of `T | None`."""

        def read(value: Any) -> Any:
            return None if isinstance(value, str) and value == "auto" else value

        def write(value: Any, inner: core_schema.SerializerFunctionWrapHandler) -> Any:
            return "auto" if value is None else inner(value)

        return core_schema.no_info_before_validator_function(
            read, handler(source), serialization=core_schema.wrap_serializer_function_ser_schema(write)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The inner schema, with null replaced by the word `auto` (null is understood too)."""
        inner = handler(schema)
        kinds = [kind for kind in inner.get("anyOf", [inner]) if kind != {"type": "null"}]
        return {"anyOf": [{"const": "auto"}, *kinds]}


@dataclass(frozen=True)
class _Amount:
    """Reads and writes one of the classes of quantities.py."""

    kind: type[Any]
    numbers: bool = False
    """Whether a plain number is a sensible way to write it (a count is; a duration without a unit is not)."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate with `kind.parse`, serialise to the text it was written as."""

        def read(value: Any) -> Any:
            try:
                return self.kind.parse(value)
            except ValueError as error:
                raise PydanticCustomError("amount", "{sentence}", {"sentence": str(error)}) from None

        def write(value: Any) -> Any:
            text = value.text
            return int(text) if self.numbers and isinstance(text, str) and text.isdecimal() else text

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(write)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Text, or a number where that is unambiguous."""
        kinds: dict[str, Any] = {"type": ["integer", "string"]} if self.numbers else {"type": "string"}
        return {**kinds, "x-allowed": self.kind.allowed}


Auto = Annotated[T | None, _Automatic()]
SecondsText = Annotated[Seconds, _Amount(Seconds)]
MoneyText = Annotated[Money, _Amount(Money)]
PriceText = Annotated[Price, _Amount(Price)]
JoulesText = Annotated[Joules, _Amount(Joules)]
BytesText = Annotated[Bytes, _Amount(Bytes)]
CountText = Annotated[Count, _Amount(Count, numbers=True)]
EveryText = Annotated[Every, _Amount(Every, numbers=True)]
