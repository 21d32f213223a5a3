"""The 38 tasks of DataComp's evaluation with their main metrics: facts, and how a set's folder is known by its name.

Source: ``tasklist.yml`` of https://github.com/mlfoundations/datacomp (commit 4afedc4), arXiv 2304.14108; a
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
    """A task's key and name in DataComp, its main metric, and its number of classes (0 for retrieval)."""

    key: str
    name: str
    metric: str
    classes: int


TASKS = (
    DataCompTask("vtab/caltech101", "Caltech-101", PER_CLASS, 102),
    DataCompTask("cifar10", "CIFAR-10", ACC1, 10),
    DataCompTask("vtab/cifar100", "CIFAR-100", ACC1, 100),
    DataCompTask("vtab/clevr_count_all", "CLEVR Counts", ACC1, 8),
    DataCompTask("vtab/clevr_closest_object_distance", "CLEVR Distance", ACC1, 6),
    DataCompTask("country211", "Country211", ACC1, 211),
    DataCompTask("vtab/dtd", "Describable Textures", ACC1, 47),
    DataCompTask("vtab/eurosat", "EuroSAT", ACC1, 10),
    DataCompTask("fgvc_aircraft", "FGVC Aircraft", PER_CLASS, 100),
    DataCompTask("food101", "Food-101", ACC1, 101),
    DataCompTask("gtsrb", "GTSRB", ACC1, 43),
    DataCompTask("imagenet1k", "ImageNet 1k", ACC1, 1000),
    DataCompTask("imagenet_sketch", "ImageNet Sketch", ACC1, 1000),
    DataCompTask("imagenetv2", "ImageNet v2", ACC1, 1000),
    DataCompTask("imagenet-a", "ImageNet-A", ACC1, 200),
    DataCompTask("imagenet-o", "ImageNet-O", ACC1, 200),
    DataCompTask("imagenet-r", "ImageNet-R", ACC1, 200),
    DataCompTask("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", ACC1, 4),
    DataCompTask("mnist", "MNIST", ACC1, 10),
    DataCompTask("objectnet", "ObjectNet", ACC1, 113),
    DataCompTask("vtab/flowers", "Oxford Flowers-102", PER_CLASS, 102),
    DataCompTask("vtab/pets", "Oxford-IIIT Pet", PER_CLASS, 37),
    DataCompTask("voc2007", "Pascal VOC 2007", ACC1, 20),
    DataCompTask("vtab/pcam", "PatchCamelyon", ACC1, 2),
    DataCompTask("renderedsst2", "Rendered SST2", ACC1, 2),
    DataCompTask("vtab/resisc45", "RESISC45", ACC1, 45),
    DataCompTask("cars", "Stanford Cars", ACC1, 196),
    DataCompTask("stl10", "STL-10", ACC1, 10),
    DataCompTask("sun397", "SUN397", ACC1, 397),
    DataCompTask("vtab/svhn", "SVHN", ACC1, 10),
    DataCompTask("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", RECALL, 0),
    DataCompTask("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", RECALL, 0),
    DataCompTask("misc/winogavil", "WinoGAViL", "jaccard_score_10-12", 0),
    DataCompTask("wilds/iwildcam", "iWildCam", "F1-macro_all", 182),
    DataCompTask("wilds/camelyon17", "Camelyon17", ACC1, 2),
    DataCompTask("wilds/fmow", "FMoW", "acc_worst_region", 62),
    DataCompTask("fairness/dollar_street", "Dollar Street", "acc_top5_wg", 58),
    DataCompTask("fairness/geode", "GeoDE", "acc_wg", 40),
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


def find_task(dataset: str, classes: int = 0) -> DataCompTask | None:
    """Return the task that a set's name means (``wds_vtab-cifar100_test``, ``cifar100``); None for another set.

    Args:
        dataset: The name of the set's folder.
        classes: Their number, which must be the task's; 0 where it is not known.
    """
    task = _BY_NAME.get(_plain(DECORATION.sub("", dataset.lower())))
    return None if task is None or (classes and classes != task.classes) else task
