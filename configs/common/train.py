train = dict(
    output_dir="output",
    init_checkpoint="",
    # A checkpoint that does not fill the whole model is an error unless this is true.
    allow_partial_checkpoint=False,
    # Train with the plan active.
    expedite=False,
    # "all", or "reducer": only the weights of a reducer that learns, such as TokenSelection; the model stays as it is.
    trainable="all",
    max_iter=90000,
    # The forward pass in bfloat16, by autocast.
    amp=dict(enabled=False),
    # Largest L2 norm of the gradient; null: no limit.
    clip_gradient=None,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False),
    checkpointer=dict(period=5000, max_to_keep=3),
    eval_period=5000,
    log_period=20,
    seed=0,
    # "cuda", "cpu", or "auto": CUDA where there is one.
    device="auto",
)

# Images that a plan is calibrated on, and the affine map of --control, without labels; and those of a search.
search = dict(
    # null: the data set that the model is trained on.
    dataset=None,
    # So many, spread evenly over it; null: 16, and 180 for --search, which ranks plans on most of them.
    images=None,
)

evaluation = dict(
    # Only the first so many images of the data set; null: all.
    max_images=None,
    # Images that a model is given at a time; times are then those of a batch.
    batch_size=1,
    # Untimed runs of each model before the first timed one.
    warmup=3,
    # "float32" or "bfloat16": the precision of both models, by autocast.
    dtype="float32",
    # Of the page of --report: detections of at least this score are looked at, and so many images shown.
    report=dict(score=0.5, images=24),
)
