"""The spec strings: one string names a wiring everywhere."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addnorm.contract import Spec, catalogue, parse_spec, split_specs

LISTED = f"(addnorm wirings lists the {len(catalogue())})"
each_example = settings(derandomize=True, deadline=None, max_examples=100)
finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        # the name alone
        ("prenorm", "prenorm"),
        ("  prenorm ", "prenorm"),
        ("prenorm()", "prenorm"),
        ("prenorm:", "prenorm"),
        # options in parentheses
        ("layerscale(init=1e-5)", "layerscale(init=1e-5)"),
        ("layerscale (init=1e-5)", "layerscale(init=1e-5)"),
        ("layerscale( init = 1e-5 )", "layerscale(init=1e-5)"),
        ("plain(norm=true)", "plain(norm=true)"),
        ("plain(norm=True)", "plain(norm=true)"),
        # the shell-friendly form
        ("layerscale:init=1e-5", "layerscale(init=1e-5)"),
        ("plain:norm=true", "plain(norm=true)"),
        # defaults are dropped
        ("layerscale(init=1e-4)", "layerscale"),
        ("layerscale:init=0.0001", "layerscale"),
        ("plain(norm=false)", "plain"),
        ("plain(norm=False)", "plain"),
        # one way to write a number
        ("layerscale(init=0.00001)", "layerscale(init=1e-5)"),
        ("layerscale(init=1)", "layerscale(init=1.0)"),
        ("layerscale(init=-0.5)", "layerscale(init=-0.5)"),
        ("layerscale(init=0)", "layerscale(init=0.0)"),
        ("layerscale(init=1E+20)", "layerscale(init=1e20)"),
        ("layerscale(init=1e-10)", "layerscale(init=1e-10)"),
        ("layerscale(init=1.5e-07)", "layerscale(init=1.5e-7)"),
    ],
)
def test_canonical_form(text, canonical):
    """However it is written, a spec has one canonical form, and that form reads back as itself."""
    assert str(parse_spec(text)) == canonical
    assert str(parse_spec(canonical)) == canonical


@each_example
@given(finite)
def test_float_option_survives_the_round_trip(init):
    """Any finite number comes back exactly from the canonical form."""
    canonical = str(parse_spec(f"layerscale(init={init!r})"))
    again = parse_spec(canonical)
    assert str(again) == canonical
    assert again.options.get("init", 1e-4) == init
    assert type(again.options.get("init", 1e-4)) is float


@each_example
@given(finite)
def test_both_forms_say_the_same(init):
    """The shell-friendly form is read as the form in parentheses."""
    assert parse_spec(f"layerscale:init={init!r}") == parse_spec(f"layerscale(init={init!r})")


@pytest.mark.parametrize("norm", [False, True])
def test_bool_option_survives_the_round_trip(norm):
    """A truth value comes back from the canonical form."""
    again = parse_spec(str(parse_spec(f"plain(norm={norm})")))
    assert again.options.get("norm", False) is norm


@pytest.mark.parametrize("name", catalogue())
def test_every_name_reads_as_its_wiring(name):
    """A name alone stands for its class with the default options."""
    spec = parse_spec(name)
    assert spec == Spec(name)
    assert spec.wiring is catalogue()[name]
    assert str(spec) == name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" , ,", []),
        ("prenorm", ["prenorm"]),
        ("plain,prenorm", ["plain", "prenorm"]),
        (" plain , prenorm,", ["plain", "prenorm"]),
        ("plain,layerscale(init=1e-5),rezero", ["plain", "layerscale(init=1e-5)", "rezero"]),
        ("mhc(n=4, iterations=20),plain", ["mhc(n=4, iterations=20)", "plain"]),
        ("layerscale:init=1e-5,plain:norm=true", ["layerscale:init=1e-5", "plain:norm=true"]),
    ],
)
def test_list_splits_outside_parentheses(text, parts):
    """A list of specs splits at the commas that do not lie in parentheses."""
    assert split_specs(text) == parts


@each_example
@given(st.lists(st.sampled_from([*catalogue(), "plain(norm=true)", "mhc(n=4, iterations=20)"])))
def test_joined_list_splits_back(specs):
    """Splitting undoes joining."""
    assert split_specs(",".join(specs)) == specs
    assert split_specs(", ".join(specs)) == specs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "cannot read the wiring ''; write name, name(option=value) or name:option=value",
        ),
        (
            "prenorm(",
            "cannot read the wiring 'prenorm('; "
            "write name, name(option=value) or name:option=value",
        ),
        (
            "plain,prenorm",
            "cannot read the wiring 'plain,prenorm'; "
            "write name, name(option=value) or name:option=value",
        ),
        ("prenrm", f"unknown wiring 'prenrm'; did you mean 'prenorm'? {LISTED}"),
        ("PreNorm", f"unknown wiring 'PreNorm'; did you mean 'prenorm'? {LISTED}"),
        ("zzzz", f"unknown wiring 'zzzz' {LISTED}"),
        (
            "layerscale(ini=1e-5)",
            "unknown option of layerscale 'ini'; did you mean 'init'? (known: init)",
        ),
        ("layerscale(x=1)", "unknown option of layerscale 'x' (known: init)"),
        ("layerscale(device=cpu)", "unknown option of layerscale 'device' (known: init)"),
        ("prenorm(init=1)", "unknown option of prenorm 'init' (known: none)"),
        (
            "layerscale(1e-5)",
            "cannot read '1e-5' in the wiring 'layerscale(1e-5)'; write option=value",
        ),
        (
            "layerscale(init=)",
            "cannot read 'init=' in the wiring 'layerscale(init=)'; write option=value",
        ),
        (
            "layerscale(init=1,)",
            "cannot read '' in the wiring 'layerscale(init=1,)'; write option=value",
        ),
        (
            "layerscale(init=1, init=2)",
            "the wiring 'layerscale(init=1, init=2)' sets init twice",
        ),
        (
            "layerscale(init=small)",
            "init=small of layerscale must be a number",
        ),
        (
            "layerscale(init=true)",
            "init=true of layerscale must be a number",
        ),
        (
            "layerscale(init=nan)",
            "init=nan of layerscale must be a finite number",
        ),
        (
            "layerscale(init=1e999)",
            "init=inf of layerscale must be a finite number",
        ),
        ("plain(norm=1)", "norm=1 of plain must be true or false"),
        ("plain:norm=yes", "norm=yes of plain must be true or false"),
        (
            "plain(norm=__import__('os'))",
            "norm=__import__('os') of plain must be true or false",
        ),
        ("layerscale(init=-inf)", "init=-inf of layerscale must be a finite number"),
        ("mhc:n=4.0", "n=4.0 of mhc must be a whole number"),
        ("mhc(n='4')", "n='4' of mhc must be a whole number"),
        ("mhc:n=0", "n=0 of mhc must be from 2 to 16"),
        (
            "droppath:per=token",
            "unknown value 'token' of per in 'droppath:per=token' (known: sample, batch)",
        ),
        (
            "mhc:n=4,iterations=5",
            "cannot read 'n=4,iterations=5' in the wiring 'mhc:n=4,iterations=5'; "
            "separate options by ':'",
        ),
        (  # what a comma list makes of it
            "iterations=5",
            "cannot read the wiring 'iterations=5'; write name, name(option=value) or "
            "name:option=value; separate options by ':'",
        ),
    ],
)
def test_bad_spec_is_refused_with_the_reason(text, message):
    """What cannot be read is refused with what it was, and what was probably meant."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        parse_spec(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("nope", {}, "nope"),
        ("mhc", {"m": 3}, "mhc(m=3)"),
        ("mhc", {"n": "4"}, "mhc(n='4')"),
        ("mhc", {"n": 2.5}, "mhc(n=2.5)"),
        ("mhc", {"n": 0}, "mhc(n=0)"),
        ("plain", {"norm": 1}, "plain(norm=1)"),
        ("layerscale", {"init": math.nan}, "layerscale(init=nan)"),
        ("layerscale", {"init": True}, "layerscale(init=true)"),
        ("droppath", {"per": "token"}, "droppath:per=token"),
    ],
)
def test_a_bad_spec_object_is_refused_as_its_text_is(name, options, text):
    """There is one way in: what a string may not say, an object may not hold."""
    with pytest.raises(ValueError, match=" ") as by_object:
        Spec(name, options)
    with pytest.raises(ValueError, match=" ") as by_text:
        parse_spec(text)
    assert str(by_object.value) == str(by_text.value)
    assert "\n" not in str(by_object.value)


def test_a_spec_object_is_canonical():
    """Whole numbers become floats where the option is one, and defaults are dropped."""
    given = {"init": 1}
    assert Spec("layerscale", given) == parse_spec("layerscale(init=1.0)")
    assert type(Spec("layerscale", given).options["init"]) is float
    assert type(given["init"]) is int  # what was given is left alone
    assert Spec("layerscale", {"init": 1e-4}).options == {}
    assert str(Spec("mhc", {"iterations": 5, "n": 2})) == "mhc(n=2, iterations=5)"


@each_example
@given(st.text(st.characters(codec="ascii"), max_size=20))
def test_a_bad_value_is_a_value_error(value):
    """Whatever stands where a value should, it is a finite number or a `ValueError`."""
    try:
        spec = parse_spec(f"layerscale(init={value})")
    except ValueError:
        return
    assert math.isfinite(spec.options["init"])
