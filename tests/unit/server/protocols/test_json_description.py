"""The description of the layers, from which pages make their controls."""

from poolrpc_server.protocols.json.description import describe_layers

BY_NAME = {each["name"]: each for each in describe_layers()}


def parameters(name):
    """Return the kind, the default and the choices of each parameter of a layer."""
    found = BY_NAME[name]["parameters"]
    return {each["name"]: (each["kind"], each["default"], each["choices"]) for each in found}


def test_parameters_are_those_of_the_class():
    """Kinds and defaults come from the annotations; a parameter that takes numbers and names has no choices."""
    assert parameters("MaxPool2d") == {
        "kernel_size": ("integers", None, ()),
        "stride": ("integers", None, ()),
        "padding": ("integers", 0, ()),
        "dilation": ("integers", 1, ()),
        "return_indices": ("boolean", False, ()),
        "ceil_mode": ("boolean", False, ()),
    }
    assert parameters("LPPool2d")["norm_type"][0] == "number"
    assert parameters("FractionalMaxPool2d")["output_ratio"] == ("numbers", None, ())
    assert parameters("Normalize")["mean"][0] == "numbers"
    assert parameters("AdaptiveAvgPool2d")["output_size"][0] == "integers"


def test_names_are_choices():
    """A reduction and a dtype are chosen by their names."""
    kind, _, choices = parameters("GlobalPool2d")["reduce"]
    assert kind == "string"
    assert {"max", "mean"} <= set(choices)
    kind, _, choices = parameters("ToDtype")["dtype"]
    assert kind == "string"
    assert {"float32", "uint8"} <= set(choices)


def test_help_is_that_of_the_docstring():
    """A class that refers to its 2d relative has the relative's help; spaces of the docstring's lines are one."""
    help_texts = [
        next(each["help"] for each in BY_NAME[name]["parameters"] if each["name"] == "stride")
        for name in ("MaxPool1d", "MaxPool2d", "MaxPool3d")
    ]
    assert len(set(help_texts)) == 1
    assert help_texts[0].startswith("Distance between windows in cells, 1 to 65535: an int or a pair.")
    assert (
        BY_NAME["MaxPool2d"]["summary"]
        == "The maximum of each window of a 2d input, as torch.nn.MaxPool2d computes it."
    )


def test_values_to_begin_with():
    """There is a value for each required parameter, and for one of several if a layer needs any of them."""
    assert BY_NAME["MaxPool2d"]["example"] == {"kernel_size": 2}
    assert BY_NAME["FractionalMaxPool2d"]["example"] == {"kernel_size": 2, "output_size": 2}
    assert BY_NAME["ToDtype"]["example"] == {"dtype": "float32"}
    assert BY_NAME["Round"]["example"] == {}
