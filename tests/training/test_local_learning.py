"""Local learning: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks import auxiliary
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import tree_map
from tests.golden_runner import call_args, compare_gradients, golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.training import laws_local_learning

globals().update(law_tests(laws_local_learning))


@golden("local_learning")
def test_local_learning_golden_ref(case):
    run(case, ref.local_learning)


def classifier_loss(a):
    """Gradients of `aux_classifier_loss`, through the logits."""
    d = cross_entropy(auxiliary.aux_classifier(a["h_grid"], a["params"]), a["labels"])[1]
    return dict(
        zip(("h_grid", "params"), auxiliary.aux_classifier_vjp(a["h_grid"], a["params"], d), strict=True)
    )


# losses whose backward pass knows no cotangent: arguments -> {argument: gradient}
LOSSES = {
    "mse_reconstruction": lambda a: {"prediction": auxiliary.mse_reconstruction_vjp(**a)},
    "bce_reconstruction": lambda a: {"prediction": auxiliary.bce_reconstruction_vjp(**a)},
    "supervised_contrastive": lambda a: {"features": auxiliary.supervised_contrastive_vjp(**a)},
    "aux_classifier_loss": classifier_loss,
}


@graded("local_learning")
def test_local_learning_golden_gradients(case):
    fn = case.meta["fn"]
    if fn not in LOSSES:
        run_backward(case, auxiliary)
    else:
        weight = case[case.meta["cotangents"][0]]
        grads = LOSSES[fn](call_args(case, getattr(auxiliary, fn)))
        compare_gradients(case, tree_map(lambda g: weight * g, grads))


L = ref.local_learning
P = L.init_local(0, image_size=4, patch=2, dim=4, depth=3, num_classes=3, boundaries=(1, 3), hidden=5)
IMAGES, LABELS = np.full((2, 4, 4, 3), 0.5), np.array([0, 2])
H, DECODER = np.ones((2, 4, 4)), P.aux[0].decoder
MAPS, AUX = np.ones((2, 3, 3, 4)), auxiliary.init_aux(np.random.default_rng(0), 4, 3, hidden=5)
INFO = L.init_local(
    0, image_size=4, patch=2, dim=4, depth=3, num_classes=3, boundaries=(1, 3), method="infopro"
)


def step(params=P, images=IMAGES, labels=LABELS, **options):
    settings = {"boundaries": (1, 3), "learning_rate": 0.1, "num_heads": 2, **options}
    return L.local_train_step(params, (images, labels), **settings)


def loss(aux=P.aux[0], target=H, **options):
    return L.local_loss(H, target, LABELS, aux, **{"lambda_rec": 1.0, "lambda_cls": 1.0, **options})


BAD = {
    "modules": (lambda: L.split_blocks([1, 1], 3), r"k must be in 1\.\.2"),
    "no_modules": (lambda: L.split_blocks([1, 1], 0), r"k must be in 1\.\.2"),
    "order": (lambda: step(boundaries=(2, 1)), "boundaries must increase"),
    "repeat": (lambda: step(boundaries=(3, 3)), "boundaries must increase"),
    "end": (lambda: step(boundaries=(1, 2)), "end with the number of blocks 3"),
    "helpers": (lambda: step(boundaries=(1, 2, 3)), r"params\.aux must have length 2"),
    "method": (lambda: step(method="dfa"), "method must be one of"),
    "first_target": (lambda: step(first_target="noise"), "first_target must be"),
    "labels": (lambda: step(labels=np.array([0, 3])), r"labels must be in 0\.\.2"),
    "labels_shape": (lambda: step(labels=np.array([0])), r"labels\.shape\[0\] = 1"),
    "image": (
        lambda: step(params=INFO, images=2 * IMAGES + 1, method="infopro"),
        r"target must be in \[0, 1\]",
    ),
    "image_nan": (lambda: L.bce_reconstruction(IMAGES * np.nan, IMAGES), r"prediction must be in \[0, 1\]"),
    "bce_shape": (lambda: L.bce_reconstruction(IMAGES, IMAGES[:1]), "target must have prediction's shape"),
    "mse_shape": (lambda: L.mse_reconstruction(IMAGES, IMAGES[:1]), "target must have prediction's shape"),
    "wrong_decoder": (lambda: step(method="infopro"), r"aux\.decoder must be an image decoder"),
    "rec": (lambda: loss(rec="ssim"), "rec must be"),
    "cls": (lambda: loss(cls="triplet"), "cls must be"),
    "weights": (lambda: loss(lambda_rec=-1.0), "must not be negative"),
    "kind": (lambda: L.feature_decoder(H, DECODER, kind="unet"), "kind must be one of"),
    "other_kind": (lambda: L.feature_decoder(H, DECODER, kind="conv"), "params are those of a 'mlp' decoder"),
    "square": (
        lambda: L.feature_decoder(
            np.ones((2, 5, 4)),
            L.init_feature_decoder(np.random.default_rng(0), 4, 4, kind="conv"),
            kind="conv",
        ),
        "square grid of tokens, got N=5",
    ),
    "size": (lambda: L.upsample_bilinear(IMAGES, size=0), "size must be at least 1"),
    "no_pixel": (lambda: L.upsample_bilinear(IMAGES[:, :0], size=2), "x must hold a pixel"),
    "costs": (lambda: L.split_blocks([1, -1], 1), "costs must be finite and not negative"),
    "nothing": (lambda: L.mse_reconstruction(H[:0], H[:0]), "prediction must not be empty"),
    "no_pixels": (lambda: L.bce_reconstruction(IMAGES[:0], IMAGES[:0]), "prediction must not be empty"),
    "no_images": (lambda: step(images=IMAGES[:0], labels=LABELS[:0]), "at least one image"),
    "no_maps": (lambda: L.aux_classifier(MAPS[:0], AUX), "h_grid must hold at least one example"),
    "aux_bias": (lambda: L.aux_classifier(MAPS, AUX._replace(b1=np.ones(2))), r"b1\.shape\[0\] = 2"),
    "decoder_norm": (
        lambda: L.image_decoder(MAPS, INFO.aux[0].decoder._replace(bn_bias=np.ones(2)), image_size=4),
        r"bn_bias\.shape\[0\] = 2",
    ),
    "module_weights": (lambda: step(lambda_rec=(1.0, 2.0)), "lambda_rec must be one number, or 1,"),
    "temperature": (lambda: L.supervised_contrastive(H[0], np.arange(4), temperature=0), "temperature > 0"),
    "alone": (lambda: L.supervised_contrastive(H[0, :0], np.arange(0)), "at least one sample"),
    "schedule": (lambda: L.lambda_schedule(1, 2, first=1, last=0), "modules - 2"),
    "one_module": (lambda: L.lambda_schedule(0, 1, first=1, last=0), "modules >= 2"),
    "memory": (
        lambda: L.activation_memory(L.swin_tiny(), boundaries=(6,), method="feature", batch=1),
        "end with the number of blocks 12",
    ),
    "class_token": (
        lambda: step(params=P._replace(net=P.net._replace(cls_token=np.ones(4)))),
        "must have no class token",
    ),
}

test_local_learning_rejects_bad_input = rejects(BAD)
