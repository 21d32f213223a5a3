"""The 38 tasks of DataComp's evaluation with their main metrics: facts, and how a set's folder is known by its name.

Source: ``tasklist.yml`` of https://github.com/mlfoundations/datacomp (commit 4afedc4), arXiv 2304.14108, appendix N; a
task without a main metric there counts by acc1 (its ``evaluate.py``). FairFace and UTKFace are in that list too; they
have no main metric, and the average leaves them out, which makes 38. Five tasks need labels beyond a class (regions,
income, associations): their metrics are not measured here.
"""

import re
from dataclasses import dataclass

ACC1 = "acc1"
PER_CLASS = "mean_per_class_recall"
RECALL = "mean_recall@1"  # the mean of both directions


@dataclass(frozen=True)
class DataCompTask:
    """A task's key and name in DataComp, and its main metric."""

    key: str
    name: str
    metric: str = ACC1


TASKS = (
    DataCompTask("vtab/caltech101", "Caltech-101", PER_CLASS),
    DataCompTask("cifar10", "CIFAR-10"),
    DataCompTask("vtab/cifar100", "CIFAR-100"),
    DataCompTask("vtab/clevr_count_all", "CLEVR Counts"),
    DataCompTask("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    DataCompTask("country211", "Country211"),
    DataCompTask("vtab/dtd", "Describable Textures"),
    DataCompTask("vtab/eurosat", "EuroSAT"),
    DataCompTask("fgvc_aircraft", "FGVC Aircraft", PER_CLASS),
    DataCompTask("food101", "Food-101"),
    DataCompTask("gtsrb", "GTSRB"),
    DataCompTask("imagenet1k", "ImageNet 1k"),
    DataCompTask("imagenet_sketch", "ImageNet Sketch"),
    DataCompTask("imagenetv2", "ImageNet v2"),
    DataCompTask("imagenet-a", "ImageNet-A"),
    DataCompTask("imagenet-o", "ImageNet-O"),
    DataCompTask("imagenet-r", "ImageNet-R"),
    DataCompTask("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
    DataCompTask("mnist", "MNIST"),
    DataCompTask("objectnet", "ObjectNet"),
    DataCompTask("vtab/flowers", "Oxford Flowers-102", PER_CLASS),
    DataCompTask("vtab/pets", "Oxford-IIIT Pet", PER_CLASS),
    DataCompTask("voc2007", "Pascal VOC 2007"),
    DataCompTask("vtab/pcam", "PatchCamelyon"),
    DataCompTask("renderedsst2", "Rendered SST2"),
    DataCompTask("vtab/resisc45", "RESISC45"),
    DataCompTask("cars", "Stanford Cars"),
    DataCompTask("stl10", "STL-10"),
    DataCompTask("sun397", "SUN397"),
    DataCompTask("vtab/svhn", "SVHN"),
    DataCompTask("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", RECALL),
    DataCompTask("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", RECALL),
    DataCompTask("misc/winogavil", "WinoGAViL", "jaccard_score_10-12"),
    DataCompTask("wilds/iwildcam", "iWildCam", "F1-macro_all"),
    DataCompTask("wilds/camelyon17", "Camelyon17"),
    DataCompTask("wilds/fmow", "FMoW", "acc_worst_region"),
    DataCompTask("fairness/dollar_street", "Dollar Street", "acc_top5_wg"),
    DataCompTask("fairness/geode", "GeoDE", "acc_wg"),
)
OTHER_NAMES = {  # what the same images are called elsewhere, CLIP_benchmark's names among them
    "imagenet": "imagenet1k",
    "flickr30k": "flickr_1k_test_image_text_retrieval",
    "mscoco_captions": "mscoco_2014_5k_test_image_text_retrieval",
}
DECORATION = re.compile(r"^wds_|_test$")  # of folders of the hub: wds_vtab-cifar100_test


def _plain(name: str) -> str:
    return re.sub(r"[-_/ ]", "", name.lower())


_BY_NAME = {_plain(task.key.rpartition("/")[2]): task for task in TASKS}
_BY_NAME |= {_plain(task.key): task for task in TASKS}
_BY_NAME |= {_plain(name): _BY_NAME[_plain(key)] for name, key in OTHER_NAMES.items()}


def find_task(dataset: str) -> DataCompTask | None:
    """Return the task that a set's name means (``wds_vtab-cifar100_test``, ``cifar100``); None for another set."""
    return _BY_NAME.get(_plain(DECORATION.sub("", dataset.lower())))
