"""A model over two devices of which one is imitated, with fake tensors: they have no values, but an operation on
tensors of different devices fails as it does on real ones. Argument: the family. Prints what lies where.

The second device is a python backend of torch, with one device. The first is the CPU, and then the other way round.
"""

import sys
from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from family_models import tiny_model

from modeling_deepseekmoe import add_auxiliary_loss, track_router_load, update_router_bias
from modeling_deepseekmoe.families.moe_layers import find_moe_layers


def put(module: nn.Module, device: str) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend("other")
    for devices in (("other:0", "cpu"), ("cpu", "other:0")):
        model = tiny_model(sys.argv[1]).train()
        model.set_experts_implementation("batched_mm")  # no size of a tensor depends on values
        add_auxiliary_loss(model, expert=0.1, device=0.1, sequence=0.1, z=0.1, num_devices=2)
        track_router_load(model)
        with FakeTensorMode():
            put(model, devices[0])
            placed = {layer: devices[index // 2] for index, layer in enumerate(model.model.layers)}
            placed |= {model.model.embed_tokens: devices[0], model.model.norm: devices[1], model.lm_head: devices[1]}
            for module, device in placed.items():
                put(module, device)
                add_hook_to_module(module, AlignDevicesHook(device))
            add_hook_to_module(model, AlignDevicesHook(devices[0], io_same_device=True))
            ids = torch.zeros(2, 8, dtype=torch.long, device=devices[0])
            for _ in range(2):  # the counts of the first step are there in the second
                outputs = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                outputs.loss.backward()
            update_router_bias(model)
        gates = [layer.gate.weight for layer in find_moe_layers(model)]
        assert [gate.device for gate in gates] == [gate.grad.device for gate in gates]
        print(outputs.loss.device, outputs.aux_loss.device, *(gate.device.type for gate in gates))


if __name__ == "__main__":
    main()
