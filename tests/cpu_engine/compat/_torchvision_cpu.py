"""Let the registry's torchvision, which is linked to CUDA, import under a CPU-only torch.

Its `_C.so` cannot be loaded without libtorch_cuda, so `torch.ops.torchvision.*` is missing and
`torch.library.register_fake("torchvision::nms")` raises while torchvision is imported. SGLang's image processors use
only the Python transforms: defining the schemas of the two ops is enough.

A .pth file imports this module in every process (SGLang spawns its workers), hence the import hook: nothing is paid
until torchvision is asked for.
"""

import importlib.abc
import sys
from importlib.metadata import version

TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Define the missing schemas just before torchvision is imported, then step aside. Finds no module itself."""

    library = None  # a torch Library undefines its ops when it is collected, so the class keeps it

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            self.define_schemas()
        return None

    @classmethod
    def define_schemas(cls):
        import torch

        if torch.version.cuda is not None or version("torchvision").endswith("+cpu"):
            return
        cls.library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in TORCHVISION_SCHEMAS:
            cls.library.define(schema)


sys.meta_path.insert(0, TorchvisionSchemas())
