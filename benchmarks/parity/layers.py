"""Copies weights between our Dense layers and torch's Linears; both have kernels (out, in)."""


def to_linear(layer, dense):
    """Writes the weights of a Dense into a torch Linear."""
    import torch

    layer.weight.data = torch.tensor(dense["kernel"])
    layer.bias.data = torch.tensor(dense["bias"])


def from_linear(layer, grad=False):
    """The inverse of `to_linear`, for the parameters or for their gradients."""
    weight, bias = (x.grad if grad else x.data for x in (layer.weight, layer.bias))
    return {"kernel": weight.numpy().copy(), "bias": bias.numpy().copy()}


def to_mlp(layers, params):
    """Writes the weights of Dense_0, Dense_1, ... into the Linears of a torch Sequential."""
    for i, layer in enumerate(layer for layer in layers if hasattr(layer, "weight")):
        to_linear(layer, params[f"Dense_{i}"])


def from_mlp(layers, grad=False):
    """The inverse of `to_mlp`, for the parameters or for their gradients."""
    linears = [layer for layer in layers if hasattr(layer, "weight")]
    return {f"Dense_{i}": from_linear(layer, grad) for i, layer in enumerate(linears)}
