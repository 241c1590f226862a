"""
Every configuration key that kd_det adds to Detectron2's, and how a config file is read.

`load_config` is the one way from a yaml file to a config: it refuses keys nobody knows (naming the
nearest valid ones) and resolves the paths a file names against that file's own folder.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from kd_det.config.safe_yaml import parse_yaml
from kd_det.text import nearest

CN = CfgNode


def add_kd_config(cfg: CfgNode) -> None:
    """Add all kd_det keys, with their defaults, to a Detectron2 config. Existing keys are kept."""
    _add_detectors(cfg)
    _add_training(cfg)
    cfg.KD = CN()
    _add_roles(cfg.KD)
    _add_feature_lp(cfg.KD)
    _add_ssim(cfg.KD)
    _add_pgd(cfg.KD)
    _add_aligned_pyramid(cfg.KD)


def _add_detectors(cfg: CfgNode) -> None:
    """Detectors that Detectron2 cannot build from yaml, and their backbones."""
    # Keys of BACKBONE.NAME "build_fpn_backbone", beside Detectron2's own MODEL.FPN.*: the pyramid
    # starts at the level of IN_FEATURES[0] (res2: P2, res3: P3).
    # The net below: "resnet" (MODEL.RESNETS.*, any width, also depth 18 and 34) or "timm"
    # (MODEL.TIMM.*).
    cfg.MODEL.FPN.BOTTOM_UP = "resnet"
    # Levels above P5: "p6p7_c5" (convolutions on C5: RetinaNet, ICCV 2017; MSAD), "p6p7_p5" (on P5:
    # FCOS, TPAMI 2020), "p6_c5" (P6 alone, for detectors on P2..P6), "maxpool" (P6 subsamples P5:
    # FPN, CVPR 2017) or "none".
    cfg.MODEL.FPN.TOP_BLOCK = "p6p7_c5"

    cfg.MODEL.TIMM = CN()
    # Model name in timm (extra `kd_det[timm]`).
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Download timm's ImageNet weights. They take RGB: set INPUT.FORMAT "RGB" and, for most models,
    # MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].
    cfg.MODEL.TIMM.PRETRAINED = False
    # Levels the model returns, named by stride: res2 is stride 4, res5 is stride 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    _add_fcos(cfg)
    _add_atss(cfg)
    _add_gfl(cfg)
    _add_aligned(cfg)


def _add_fcos(cfg: CfgNode) -> None:
    """FCOS (ICCV 2019; TPAMI 2020). Defaults are those of Detectron2's class and its 1x config."""
    cfg.MODEL.FCOS = CN()
    # Object classes, background not counted.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Pyramid levels, finest first. An object belongs to the level of stride s where the longest
    # distance from the position to its sides is 4s to 8s; first and last level are open-ended.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Norm in the towers: "GN" (gcd(32, width) groups), "BN" or "SyncBN" (statistics per level), "".
    cfg.MODEL.FCOS.NORM = "GN"
    # Positions closer to a box's centre than this many strides, in x and y, may be positive.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Class probability every position starts with.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Distance in strides from a position to each side of its box that training starts with.
    # Detectron2's is 0, where the ReLU of its boxes may die: from random weights give 2.
    cfg.MODEL.FCOS.BOX_BIAS = 0.0
    # Detections below this score are dropped. The score is sqrt(class * centerness), so 0.2 means
    # the product 0.04.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Candidates each level may send to non-maximum suppression.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def _single_anchor_keys() -> CfgNode:
    """Keys of the detectors with one square anchor per position and the assignment of ATSS."""
    node = CN()
    # Object classes, background not counted.
    node.NUM_CLASSES = 80
    # Pyramid levels, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
    node.NUM_CONVS = 4
    # Norm in the towers: "GN" (groups: gcd(32, width)), "BN"/"SyncBN" (statistics per level) or "".
    node.NORM = "GN"
    # Class probability every position starts with.
    node.PRIOR_PROB = 0.01
    # Side of the anchors in strides of their level. Their centres: MODEL.ANCHOR_GENERATOR.OFFSET
    # strides from the corner of the image; SIZES and ASPECT_RATIOS there have no effect.
    node.ANCHOR_SCALE = 8.0
    # Candidates of each object on each level, nearest centres first (ATSS, CVPR 2020: 9).
    node.TOPK = 9
    # Factor of the GIoU loss.
    node.BBOX_LOSS_WEIGHT = 2.0
    # Detections of a class probability below this are dropped.
    node.SCORE_THRESH_TEST = 0.05
    # Candidates each level may send to non-maximum suppression.
    node.TOPK_CANDIDATES_TEST = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    node.NMS_THRESH_TEST = 0.6
    return node


def _add_atss(cfg: CfgNode) -> None:
    """ATSS (CVPR 2020)."""
    cfg.MODEL.ATSS = _single_anchor_keys()
    # What the third branch predicts: "centerness" (the paper), or "iou", the IoU of the predicted
    # box with its object (PGD, ECCV 2022). Its target also weighs the GIoU loss of each positive,
    # and a detection's score is sqrt(class * quality).
    cfg.MODEL.ATSS.QUALITY_BRANCH = "centerness"
    # Factor of that branch's loss (binary cross-entropy).
    cfg.MODEL.ATSS.QUALITY_LOSS_WEIGHT = 1.0
    # Multiples of (dx, dy, dw, dh) that the box branch predicts.
    cfg.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    cfg.MODEL.ATSS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.ATSS.FOCAL_LOSS_GAMMA = 2.0


def _add_gfl(cfg: CfgNode) -> None:
    """GFL (NeurIPS 2020)."""
    cfg.MODEL.GFL = _single_anchor_keys()
    # Largest distance from an anchor's centre to a side of its box, in strides of the level; each
    # side is a distribution over 0 .. REG_MAX.
    cfg.MODEL.GFL.REG_MAX = 16
    # Exponent of the quality focal loss.
    cfg.MODEL.GFL.QUALITY_FOCAL_BETA = 2.0
    # Factor of the distribution focal loss.
    cfg.MODEL.GFL.DFL_LOSS_WEIGHT = 0.25


def _add_aligned(cfg: CfgNode) -> None:
    """
    AlignedMultiScaleDetector, MSAD's teacher (CVPR 2021).

    The wrapped detector's IN_FEATURES name the full view's levels (p3..p7 at FACTOR 2, RPN's and
    ROI_HEADS' too); the FPN must also have those that the reduced view needs (p2..p6).
    """
    cfg.MODEL.ALIGNED = CN()
    # The wrapped detector, built from this same config: a dense detector or GeneralizedRCNN.
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "FCOS"
    # Sides of the reduced view are the full view's divided by this; a power of two, MSAD: 2. At 4 a
    # ResNet's full view starts at p4.
    cfg.MODEL.ALIGNED.FACTOR = 2
    # How the reduced view is computed from the normalised, padded batch: "nearest" (MSAD's code:
    # pixels 0, 2, 4, ...), "bilinear" (antialiased) or "area".
    cfg.MODEL.ALIGNED.INTERPOLATION = "nearest"
    # Blend of the two pyramids: "cff" (MSAD's crossing feature-level fusion) or "mean".
    cfg.MODEL.ALIGNED.FUSION = "cff"
    # Input units of cff's gate per hidden unit (MSAD: 16).
    cfg.MODEL.ALIGNED.FUSION_REDUCTION = 16
    # Weights of the detection losses of the branches high, low and fused (MSAD: 1, 1, 0.4).
    cfg.MODEL.ALIGNED.LOSS_WEIGHTS = [1.0, 1.0, 0.4]
    # Branch whose detections evaluation returns: "fused" (as published), "high" or "low". The
    # latter two run one view alone.
    cfg.MODEL.ALIGNED.EVAL_BRANCH = "fused"
    # BatchNorm keeps running statistics per branch, affine parameters shared. MSAD shares both, so
    # that evaluation uses a blend of the statistics of two resolutions.
    cfg.MODEL.ALIGNED.SPLIT_BN = False
    # Leave the padded area of batched images out of cff's pooling (MSAD pools over all of it).
    cfg.MODEL.ALIGNED.MASK_PADDING = False


def _add_training(cfg: CfgNode) -> None:
    """Keys of the trainer and the evaluator that Detectron2 itself lacks."""
    # "SGD" (Detectron2's own builder, honours every SOLVER key) or "AdamW" (no momentum keys).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Library that computes COCO metrics: "pycocotools", "faster_coco_eval" (same numbers, several
    # times faster, extra `kd_det[eval]`), or "auto": the faster one where it is installed.
    cfg.TEST.COCO_BACKEND = "auto"


def _add_roles(kd: CfgNode) -> None:
    """Who teaches whom."""
    # Active distillers, by registry name, e.g. ["FeatureLp", "SSIM"]. Empty: plain detection
    # training.
    kd.DISTILLERS = []

    kd.STUDENT = CN()
    # Meta-architecture of the student; what MODEL.META_ARCHITECTURE is in a plain Detectron2
    # config.
    kd.STUDENT.META_ARCHITECTURE = ""
    # What the student sees of the loaded image: its size is divided by this factor (>= 1). Powers
    # of two pair pyramid levels exactly; any other factor needs KD.RESAMPLE_LEVELS. MSAD uses 2.
    kd.STUDENT.VIEW_FACTOR = 1.0
    # How the reduced view is computed: "nearest" (MSAD's code), "bilinear" (antialiased), "area".
    kd.STUDENT.VIEW_INTERPOLATION = "bilinear"

    kd.TEACHER = CN()
    # The teacher's own config file: relative to the yaml that names it, or to the working
    # directory.
    kd.TEACHER.CONFIG_FILE = ""
    # Its checkpoint (path or URL). "auto": the final checkpoint in the OUTPUT_DIR of the teacher's
    # config, which train_net.py trains first when it is absent.
    kd.TEACHER.WEIGHTS = "auto"
    # Overrides of the teacher's config: ["KEY", value, ...].
    kd.TEACHER.OPTS = []
    # Arithmetic of the teacher's forward pass alone: "float32", "float16" or "bfloat16" (autocast).
    kd.TEACHER.PRECISION = "float32"
    # Patterns (fnmatch) of checkpoint keys that may stay unmatched when the teacher is loaded.
    kd.TEACHER.IGNORE_KEYS = []

    # Module-path patterns (fnmatch, e.g. ["head.*", "backbone.fpn_*"]) of the student's tensors
    # that start as the teacher's, where names and shapes match. Applied at a fresh start only,
    # never on resume. PGD (ECCV 2022) inherits neck and head; MSAD (CVPR 2021) everything: ["*"].
    kd.INHERIT = []
    # Pair levels on different grids by resampling the teacher's map to the student's. Off: such
    # levels are not paired, and a run in which nothing pairs stops.
    kd.RESAMPLE_LEVELS = False
    # Iterations between measurements of kd/<distiller>/grad_share; 0 switches them off.
    kd.GRAD_SHARE_PERIOD = 200
    # The user's own data in COCO format: list of {"name":, "json":, "images":}, paths relative to
    # the yaml that names them, or to the working directory.
    kd.DATASETS = []


def _weighted(weight: float) -> CfgNode:
    """Keys every distiller has: its weight, and that weight's course over the iterations."""
    node = CN()
    # Scalar in front of the distiller's losses.
    node.WEIGHT = weight
    node.SCHEDULE = CN()
    # Iterations of linear growth from 0 to the full weight; 0: none.
    node.SCHEDULE.WARMUP_ITERS = 0
    # "constant", or "cosine": from the full weight to FINAL_FACTOR of it at SOLVER.MAX_ITER.
    node.SCHEDULE.DECAY = "constant"
    node.SCHEDULE.FINAL_FACTOR = 0.0
    # First iteration with weight 0; negative: never.
    node.SCHEDULE.STOP_AT = -1
    # Piecewise factors: FACTORS[i] holds from iteration STEPS[i] on; 1 before the first step.
    node.SCHEDULE.STEPS = []
    node.SCHEDULE.FACTORS = []
    return node


def _feature_keys(weight: float) -> CfgNode:
    """Keys of distillers that compare paired pyramid levels."""
    node = _weighted(weight)
    # Module paths whose outputs are the pyramids; "path@1" is the second call of a module.
    node.STUDENT_CAPTURE = "backbone"
    node.TEACHER_CAPTURE = "backbone"
    # 1x1 convolution from the student's channels to the teacher's, dropped after training:
    # "auto" (where channel counts differ), "always" or "never".
    node.ADAPTER = "auto"
    # Leave the padded area of batched images out of the loss.
    node.MASK_PADDING = False
    return node


def _add_feature_lp(kd: CfgNode) -> None:
    """L1/L2 between paired levels: the classical baseline (FitNets, ICLR 2015, on pyramids)."""
    kd.FEATURE_LP = _feature_keys(weight=1.0)
    # Exponent of the distance: 1 or 2.
    kd.FEATURE_LP.P = 2
    # Standardise each channel of both maps over the image first (PKD, NeurIPS 2022).
    kd.FEATURE_LP.NORMALIZE = False


def _add_ssim(kd: CfgNode) -> None:
    """SSIM-KD (de Rijk et al., NeurIPS 2022). WEIGHT is the paper's lambda, 2 or 4."""
    kd.SSIM = _feature_keys(weight=4.0)
    # Odd number of cells per side of the window; "gaussian" of SIGMA cells, or "box".
    kd.SSIM.WINDOW_SIZE = 11
    kd.SSIM.SIGMA = 1.5
    kd.SSIM.WINDOW = "gaussian"
    # At the border: "reflect" (the reference code's), "renorm" (rescale what lies inside), or
    # "valid".
    kd.SSIM.BORDER = "reflect"
    # What shares one min-max range: each "channel" of each image, each "image", the whole "level",
    # or "none". The paper does not say; "channel" is what its reference library offers.
    kd.SSIM.NORMALIZE = "channel"
    # Exponents, each 0 or 1, of the luminance, contrast and structure terms (the paper's ablation).
    kd.SSIM.EXPONENTS = [1, 1, 1]


def _add_pgd(kd: CfgNode) -> None:
    """PGD (Yang et al., ECCV 2022). Values are those of FCOS R101 -> R50 where detectors differ."""
    kd.PGD = _weighted(1.0)
    # "towers": the head's towers, as published; "neck": the pyramid itself, for students whose head
    # has no towers (R-CNN students of a dense teacher; not in the paper), classification part
    # alone.
    kd.PGD.FEATURES = "towers"
    # Module paths of the towers in both models; an empty REG_TOWER (coupled heads) leaves the
    # classification part alone.
    kd.PGD.CLS_TOWER = "head.cls_subnet"
    kd.PGD.REG_TOWER = "head.bbox_subnet"
    # Block of the towers whose activation is compared; 0 is the first.
    kd.PGD.TOWER_BLOCK = 0
    # Adapter where the towers' widths differ ("auto"); the paper has none.
    kd.PGD.ADAPTER = "auto"
    # Weights of classification foreground, background, regression, attention. The release weights a
    # batch's images by each other's masks: with right masks ALPHA and BETA may need to be 2 to 4
    # times larger.
    kd.PGD.ALPHA = 0.04
    kd.PGD.BETA = 0.02
    kd.PGD.GAMMA = 0.064
    kd.PGD.DELTA = 0.0008
    # Factors of ALPHA and BETA per level, from fine to coarse.
    kd.PGD.LEVEL_WEIGHTS = [1.0, 1.25, 1.5, 1.75, 2.0]
    # Temperature of both attentions (AutoAssign: 0.4).
    kd.PGD.TAU = 0.8
    # Positions selected for each box (ATSS: 9).
    kd.PGD.TOP_K = 30
    # Exponent of the IoU in the quality score, for the two masks; 1 - it is the class score's.
    kd.PGD.XI_CLS = 0.8
    kd.PGD.XI_REG = 0.6
    # The box gates positions "before" the top-k (paper) or "after" the fit (release).
    kd.PGD.GATE = "before"
    # Padding takes part in nothing (the release's anchor-based heads); False counts it as
    # background.
    kd.PGD.MASK_PADDING = True
    # Regions annotated as crowd or ignored are no background (the release counts them as such).
    kd.PGD.MASK_IGNORED = False
    # Masks of each "image", or summed over the "batch" (the release, whose results may rest on it).
    kd.PGD.MASK_SCOPE = "image"


def _add_aligned_pyramid(kd: CfgNode) -> None:
    """MSAD's student (Qi et al., CVPR 2021). WEIGHT is alpha * T^2 / T, alpha 0.2, T 3."""
    kd.ALIGNED_PYRAMID = _feature_keys(weight=0.6)
    kd.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS = 500
    # "fusion": the aligned teacher's fused pyramid; "detector.backbone@0" / "@1": its pyramid of
    # the full / reduced view (its MODEL.ALIGNED.EVAL_BRANCH must be "fused": the others run one
    # view only); "backbone": an ordinary teacher's.
    kd.ALIGNED_PYRAMID.TEACHER_CAPTURE = "fusion"
    # "l1" (paper), "l2", "smooth_l1", "cosine" or "ssim".
    kd.ALIGNED_PYRAMID.LOSS = "l1"


def load_config(config_file: str, opts: Sequence[Any] = ()) -> CfgNode:
    """
    Read a yaml file (and the `_BASE_` files it builds on) and overrides into a full config.

    Args:
        config_file: path of a yaml file.
        opts: overrides as a flat list [KEY, value, KEY, value, ...].

    Returns:
        The config, not frozen. Relative KD.TEACHER.CONFIG_FILE, KD.TEACHER.WEIGHTS and KD.DATASETS
        paths are made absolute.

    Raises:
        FileNotFoundError: the file, or a `_BASE_`, does not exist.
        ValueError: the file is no yaml mapping, gives one value to a whole group of keys, or sets
            distillation keys while MODEL.META_ARCHITECTURE is a plain detector.
        KeyError: a key nobody knows; the message lists the nearest valid ones.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # Detectron2's default, "cuda", would only fail
    for path, content in _read_chain(config_file):
        _refuse_unknown_keys(_leaves(content), cfg, path)
        _resolve_paths(content, os.path.dirname(os.path.abspath(path)))
        _read_whole_numbers(content, cfg)
        cfg.merge_from_other_cfg(CN(content))
    _apply_overrides(cfg, opts)
    _refuse_idle_settings(cfg, config_file)
    return cfg


def _refuse_idle_settings(cfg: CfgNode, config_file: str) -> None:
    """Refuse distillation settings in a config that distils nothing."""
    idle = [key for key in ("DISTILLERS", "INHERIT") if cfg.KD[key]]
    idle += ["STUDENT.VIEW_FACTOR"] if cfg.KD.STUDENT.VIEW_FACTOR != 1 else []
    if idle and not is_distillation(cfg):
        name = cfg.MODEL.META_ARCHITECTURE
        raise ValueError(
            f"{config_file}: KD.{' and KD.'.join(idle)} would have no effect, because "
            f"MODEL.META_ARCHITECTURE is {name}. Set it to DistillationDetector, and "
            f"KD.STUDENT.META_ARCHITECTURE to {name}."
        )


def _apply_overrides(cfg: CfgNode, opts: Sequence[Any]) -> None:
    """Merge [KEY, value, ...] into cfg; relative paths in it mean the working directory."""
    if len(opts) % 2:
        raise ValueError(
            "Overrides come in pairs KEY VALUE, but an odd number of words was given: "
            f"{list(opts)}."
        )
    keys = list(opts[0::2])
    _refuse_unknown_keys(keys, cfg, "the command line")
    floats = {key for key, value in _leaves(cfg).items() if isinstance(value, float)}
    words = [float(v) if k in floats else v for k, v in zip(keys, opts[1::2], strict=True)]
    cfg.merge_from_list([word for pair in zip(keys, words, strict=True) for word in pair])
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if f"KD.TEACHER.{key}" in keys:
            cfg.KD.TEACHER[key] = _resolve(cfg.KD.TEACHER[key], os.getcwd())


def student_cfg(cfg: CfgNode) -> CfgNode:
    """
    Return the plain Detectron2 config of the student: no KD keys, its own meta-architecture.

    A student of a reduced view gets test sizes divided by the factor, so that stock Detectron2
    feeds it images of the size it was trained for (a MIN_SIZE_TEST of 0, no resizing, stays: such
    images are to be reduced beforehand). A config without student only loses its KD keys.
    """
    out = cfg.clone()
    out.defrost()
    if is_distillation(cfg):
        factor = cfg.KD.STUDENT.VIEW_FACTOR
        out.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT.META_ARCHITECTURE
        out.INPUT.MIN_SIZE_TEST = round(cfg.INPUT.MIN_SIZE_TEST / factor)
        out.INPUT.MAX_SIZE_TEST = round(cfg.INPUT.MAX_SIZE_TEST / factor)
    del out["KD"]
    return out


def is_distillation(cfg: CfgNode) -> bool:
    """Return whether the config names kd_det's wrapper as meta-architecture."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "DistillationDetector")


def changed_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings, by full key, in which a config differs from all defaults."""
    defaults = get_cfg()
    add_kd_config(defaults)
    before, now = _leaves(defaults), _leaves(cfg)
    return {key: value for key, value in now.items() if key not in before or before[key] != value}


def _read_chain(config_file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, content without `_BASE_`) from the root base file down to `config_file`."""
    chain: list[tuple[str, dict[str, Any]]] = []
    path = config_file
    while path:
        content = _read_yaml(path)
        if any(os.path.samefile(path, seen) for seen, _ in chain):
            raise ValueError(f"{config_file}: its _BASE_ files form a circle through {path}.")
        base = content.pop("_BASE_", "")
        if not isinstance(base, str):
            raise ValueError(f"{path}: _BASE_ is {base!r}, expected the path of one yaml file.")
        chain.insert(0, (path, content))
        path = os.path.join(os.path.dirname(path), os.path.expanduser(base)) if base else ""
    return chain


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Config file {path} does not exist (working directory {os.getcwd()})."
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(), path)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is not a yaml config file ({type(error).__name__}). If it is a checkpoint, "
            "give it as ...WEIGHTS and the yaml it was trained with as the config file."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a yaml mapping of keys.")
    return content


def _read_whole_numbers(content: dict[str, Any], cfg: Mapping[str, Any]) -> None:
    """Turn whole numbers into floats where a key holds a float: yacs would refuse them."""
    for key, value in content.items():
        if isinstance(value, dict):
            _read_whole_numbers(value, cfg[key])
        elif isinstance(cfg[key], float) and type(value) is int:
            content[key] = float(value)


def _leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by full key."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(_leaves(value, f"{name}."))
        else:
            out[name] = value
    return out


def _refuse_unknown_keys(keys: Iterable[str], cfg: CfgNode, source: str) -> None:
    valid = set(_leaves(cfg))
    nodes = {name.rsplit(".", i)[0] for name in valid for i in range(1, name.count(".") + 1)}
    for key in keys:
        if key in nodes:
            raise ValueError(
                f"{source}: {key} is a group of keys, expected values for single ones."
            )
        if key not in valid:
            raise KeyError(f"{source}: no config key is called {key}; {nearest(key, valid)}.")


def _resolve(path: str, folder: str) -> str:
    """Make a path absolute: against `folder` if it exists there, else the working directory."""
    if not path or path == "auto" or "://" in path:
        return path
    path = os.path.expandvars(os.path.expanduser(path))
    beside = os.path.normpath(os.path.join(folder, path))
    return beside if os.path.exists(beside) else os.path.abspath(path)


def _resolve_paths(content: dict[str, Any], folder: str) -> None:
    kd = content.get("KD") or {}
    teacher = kd.get("TEACHER") or {}
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if key in teacher:
            teacher[key] = _resolve(teacher[key], folder)
    for item in kd.get("DATASETS") or []:
        for key in ("json", "images"):
            if key in item:
                item[key] = _resolve(item[key], folder)
