"""Commands of the recorded runs, which stand above their tables, and notes on runs of earlier code.

FOLDER has the files of the commonsense suite and of natural data (lab/README.md), GEMMA is the folder of Gemma 3 270M.
"""

_OFFSITE = (
    'run="python -m lab.offsite --calibration ARC-Easy.train.json --text openbookqa.test.json '
    '--steps 60 --questions 100"'
)

# file of results -> the commands that record it, or similar results today
COMMANDS: dict[str, str] = {
    "audit.json": r"""
siftune emulate --model smollm2 --calibration ARC-Easy.train.json --rows 32 --max-length 128 --template none --out KIT
siftune audit --model smollm2 --kit KIT --train ARC-Easy.train.json --limit 256 --eval ARC-Easy.test.json \
    --eval-limit 256 --steps 32 --shadows 4 --template none --out AUDIT
""",
    "avoid.jsonl": """
run="python -m lab.avoid.run --data FOLDER --out avoid.jsonl --cells"
$run carry-30 --methods dense oracle avoid "right late" "oracle 67"
$run carry-30 --methods dense --steps 160
$run carry-30 --seeds 1 --methods dense oracle avoid
$run carry-15,phrase-30 --methods dense oracle avoid "right late"
$run vowel-30,boolq-30 --methods dense oracle avoid
""",
    "bench.json": r"""
siftune bench --against trl --steps 5 --warmup 1 --rounds 2 --methods \
    dense,dense-compiled,gast-sample,gast-averaged,gast-rest,trl-no-checkpointing
siftune bench --methods dense,rst,ist,ist+gast --steps 10 --warmup 1 --rounds 2
siftune bench --methods dense,gast-averaged,gast-rest,ist --steps 5 --warmup 1 \
    --rounds 1 --threads 2    # twice, in turns
run="siftune bench --model QWEN --against trl --warmup 1 --threads 2 --rounds 1"    # QWEN: lab.models qwen0.5b
$run --batch-size 16 --length 64 --steps 10 --methods dense,dense-checkpointing,ist,gast-sample
$run --batch-size 4 --length 256 --steps 10 --methods dense,dense-checkpointing,ist,gast-sample
$run --batch-size 4 --length 256 --steps 3 --methods dense,trl-no-checkpointing
siftune bench --batch-size 16 --length 24 --methods dense,gast-averaged,gast-rest,gast-sample,ist \
    --steps 10 --warmup 2 --rounds 2 --threads 2
run="siftune bench --methods dense --steps 2 --warmup 1 --rounds 1 --threads 2 --batch-size 16 --length 64 --dtype"
$run bfloat16    # and float32, in turns, twice; AVX-512 alone: with ONEDNN_MAX_CPU_ISA=AVX512_CORE
OMP_NUM_THREADS=2 python -m lab.floor --batch-size 16 --length 24    # and --length 128; QWEN: --length 64
""",
    "dp_cost.jsonl": """
python -m lab.dp_cost --steps 5 --warmup 1 --rounds 2 --threads 2 --out dp_cost.jsonl
""",
    "gast_cost.jsonl": """
python -m lab.gast_cost --steps 10 --warmup 1 --rounds 2 --threads 2 --out cost.jsonl
""",
    "keep.jsonl": """
run="python -m lab.keep.run --data FOLDER --out keep.jsonl"
$run --methods untrained dense kl prompts --seeds 0,1,2
$run --cells mix --methods untrained dense prompts
$run --steps 1000 --methods dense prompts
$run --models gemma3 --methods untrained dense prompts
$run --methods "asft × 0.1=asft,weight:0.1" "task × 0.3=kl,rows:task,weight:0.3"
$run --methods "ewc × 4=ewc,weight:4" fisher "own rows=kl,loss:ce"
python -m lab.keep.report keep.jsonl
""",
    "keep_epyc.jsonl": """
python -m lab.keep.run --data FOLDER --out keep_epyc.jsonl --methods dense kl
python -m lab.keep.run --data FOLDER --out keep_epyc.jsonl --methods dense --lrs 5e-4
python -m lab.keep.run --data FOLDER --out keep_epyc.jsonl --models qwen0.5b --lrs 5e-4 \
    --methods untrained dense prompts    # as --keep own
""",
    "lira_epsilon.jsonl": """
python -m lab.lira_epsilon --epsilons none,100,8,1 --models 16 --steps 30 --out lira_epsilon.jsonl
""",
    "natural.jsonl": """
run="python -m lab.pays.run N --data FOLDER --out natural.jsonl --cells"
$run intents-a,intents-b,intents-c --methods few target sifted-base --steps 90 --seeds 0,1,2
$run intents-a,intents-b,intents-c --methods sifted --steps 45 --seeds 0,1,2
$run intents-a,intents-b,intents-c --methods target --steps 210
$run raters --methods sifted --steps 45 --seeds 0,1,2
$run intents-a,intents-b,intents-c --known 16 --methods few target --steps 90 --lrs 5e-4,2e-3
$run intents-a,intents-b,intents-c --known 16 --methods sifted --steps 45 --lrs 5e-4,1e-3
$run tasks-intents,tasks-slots --methods few sifted --steps 90 --seeds 0,1,2
$run tasks-intents --methods few sifted --steps 90 --seeds 3,4
$run tasks-intents,tasks-slots --methods target --steps 90
$run tasks-slots --methods sifted --steps 45
$run tasks-intents,tasks-slots --methods few --steps 180
$run raters,tasks-intents --methods few sifted-base --steps 90
$run raters --methods target --steps 90
$run intents-a,intents-b,intents-c,raters,tasks-intents,tasks-slots --methods untrained --steps 90
$run intents-a,raters --methods oracle --steps 90
$run intents-b --methods target sifted-base --steps 180
$run intents-b --methods target --steps 360
$run intents-a --rows 720 --models qwen0.5b --methods few target sifted-base --steps 45
$run tasks-intents --models qwen0.5b --methods few sifted --steps 45
more="--models qwen0.5b --steps 45 --methods few=few,dtype:float32 sifted=sifted,dtype:float32"
$run tasks-slots $more target=target,dtype:float32
$run tasks-intents --models qwen0.5b --steps 45 --methods target=target,dtype:float32
$run intents-b --rows 720 --seeds 0,1 $more target=target,dtype:float32
$run intents-b --known 16 --steps 90 --methods target=target,dtype:float32 sifted=sifted,dtype:float32
$run tasks-intents --methods retrieved=retrieved,share:0.171,dtype:float32 --steps 90 --seeds 0,1,2
$run tasks-intents --methods rds=rds,share:0.171,dtype:float32 --steps 90
$run tasks-slots --methods retrieved=retrieved,share:0.174,dtype:float32 --steps 90
$run tasks-intents --models qwen0.5b --methods few sifted target --steps 45 --seeds 1,2
$run tasks-intents --models qwen1.5b --methods few sifted --steps 45
$run tasks-intents --methods target --steps 90 --seeds 1
$run tasks-intents --methods few sifted --steps 90 --lrs 2.5e-4,1e-3,2e-3,4e-3
$run tasks-intents --methods few sifted --steps 90 --lrs 2e-3 --seeds 1,2,3,4
$run tasks-slots --methods few sifted --steps 90 --lrs 2e-3 --seeds 0,1,2
$run tasks-intents,tasks-slots --methods target --steps 90 --lrs 2e-3 --seeds 0,1,2    # tasks-intents also 3,4
$run intents-a,intents-b,intents-c --methods target --steps 90 --lrs 1e-3,2e-3
$run intents-a,intents-b,intents-c --methods sifted --steps 45 --lrs 1e-3,2e-3
$run intents-a,intents-b,intents-c --methods few --steps 90 --lrs 2e-3    # intents-a also --lrs 1e-3
$run intents-a,intents-b,intents-c --methods few target --steps 90 --lrs 2e-3 --seeds 1,2
$run intents-a,intents-b,intents-c --methods sifted --steps 45 --lrs 1e-3 --seeds 1,2
$run tasks-intents --methods retrieved=retrieved,share:0.171 --steps 90 --lrs 2e-3
$run tasks-intents --methods random=random,share:0.171 --steps 90
$run raters --methods few target --steps 90 --lrs 1e-3,2e-3
$run raters --methods sifted --steps 45 --lrs 1e-3,2e-3
$run intents-a,intents-b,intents-c --methods target --steps 200 --lrs 2e-3
$run intents-a,intents-b,intents-c,raters,tasks-intents,tasks-slots --methods dense oracle --steps 90 --lrs 2e-3
$run tasks-slots --models qwen0.5b --methods few target sifted --steps 45 --seeds 0,1
$run intents-a --rows 720 --models qwen0.5b --methods sifted --steps 45 --seeds 0,1
$run intents-a --rows 720 --models qwen0.5b --methods few target --steps 45 --seeds 1
$run tasks-intents --models qwen0.5b --methods few target sifted --steps 45 --lrs 1e-3
$run tasks-intents --methods ifd=ifd,share:0.171 less=less,share:0.171 --steps 90 --lrs 2e-3
$run intents-a,intents-b,intents-c --methods sifted --steps 90 --lrs 1e-3 --seeds 0,1,2
$run raters --methods sifted --steps 90 --seeds 0,1,2    # seed 0 also --lrs 1e-3
$run intents-a,intents-b,intents-c --known 16 --methods sifted --steps 90 --lrs 1e-3
$run intents-a,intents-b,intents-c,raters --methods few target --steps 90 --lrs 1e-3 --seeds 1
$run raters --methods random=random,share:0.716 rds=rds,share:0.716 --steps 90 --lrs 2e-3
$run intents-b --methods random=random,share:0.636 rds=rds,share:0.636 --steps 90 --lrs 2e-3
$run intents-c,raters --rows 720 --models qwen0.5b --methods few target sifted --steps 45
$run intents-a,intents-b,intents-c --methods sifted --steps 90 --lrs 5e-4,2e-3
$run intents-a --methods sifted --steps 90 --lrs 2e-3 --seeds 1,2
$run intents-a,intents-b --models qwen0.5b --methods few target sifted --steps 90
$run intents-b --models qwen0.5b --methods target sifted --steps 90 --seeds 1,2
$run raters --rows 720 --models qwen0.5b --methods target sifted --steps 45 --seeds 1,2
$run translations-bg --rows 720 --models qwen0.5b --methods few target sifted --steps 45
$run solutions --methods untrained few target sifted --steps 45
$run translations-bg --rows 720 --models gemma3 --methods few target sifted --steps 45 --seeds 0,1,2
$run translations-bg --rows 720 --models gemma3 --methods few target sifted --steps 45 --lrs 1e-3
$run translations-bg --rows 720 --models gemma3 --methods dense --steps 45
$run translations-bg --rows 720 --models gemma3 --methods target sifted --steps 90
$run raters --methods few --steps 90 --seeds 1,2
$run raters --methods target --steps 90 --lrs 2e-3 --seeds 1,2
$run intents-b --methods sifted-twice --steps 45    # commit 2bda5b0b
$run tasks-slots --methods sifted-tokens --steps 90    # commit 2bda5b0b
python -m lab.pays.report natural.jsonl    # further rates: --lr 2e-3
""",
    "offsite.jsonl": rf"""{_OFFSITE}
$run --rows 256 --keeps 0.7,0.5 --seeds 0 --out offsite.jsonl --methods "gradot, whitened, MLP refit" \
    "gradot, whitened" "gradot, paper's basis" layerdrop "measured="    # also --seeds 1 --keeps 0.7
$run --rows 256 --keeps 0.7 --seeds 0 --out offsite.jsonl --methods \
    "λ 0.1=allot:uniform,lambda_attn:0.1,lambda_mlp:0.1" "λ 0.3=allot:uniform,lambda_attn:0.3,lambda_mlp:0.3" \
    "λ 1=allot:uniform,lambda_attn:1,lambda_mlp:1"
python -m lab.offsite --report lab/results/offsite.jsonl
""",
    "offsite_chat.jsonl": rf"""{_OFFSITE}
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out chat.jsonl --methods "own=" --template auto \
    --source prompted --own-length 128
$run --rows 1024 --keeps 0.7 --seeds 0 --lrs 5e-4 --out chat.jsonl --methods "70=" --template auto \
    --source prompted --own-length 70
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out chat.jsonl --methods "rows=" --template auto
""",
    "offsite_default.jsonl": rf"""{_OFFSITE}
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out default.jsonl --methods "own=" --source prompted \
    --own-length 40    # also --rows 2048 "2,048=", --own-length 128 "128="
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out default.jsonl --methods "1,024 rows="
""",
    "offsite_forms.jsonl": rf"""{_OFFSITE}
$run --rows 256 --keeps 0.7 --tune none --out forms.jsonl --methods "gradot, paper's basis" \
    "gradot, paper's basis, λ 0.1" "gradot, paper's basis, DRD alone" "gradot, paper's basis, SCP alone" \
    "unit of the paper, 0.01=allot:uniform,basis:svd,mlp:channels,lambda_unit:paper,lambda_attn:0.01,lambda_mlp:0.01"
    # the last one also with 0.0001 and 1.0
""",
    "offsite_gemma_default.jsonl": rf"""{_OFFSITE}
$run --model GEMMA --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-5 --out gemma.jsonl --methods "1,024 rows="
    # also --own-length 40 with "own=" --source prompted and "mixed=" --source mixed; --own-length 128 with
    # "128=" --source prompted; --rows 256 with "256 rows="
""",
    "offsite_gemma_low.jsonl": rf"""{_OFFSITE}
$run --model GEMMA --rows 256 --keeps 0.7 --seeds 0 --lrs 2e-5 --out gemma.jsonl --methods "256 rows="
""",
    "offsite_gemma_outer.jsonl": rf"""{_OFFSITE}
$run --model GEMMA --rows 256 --keeps 0.7 --seeds 0,1,2 --lrs 5e-5 --outer 3 --out outer.jsonl --methods "measured="
""",
    "offsite_gemma_rates.jsonl": rf"""{_OFFSITE}
$run --model GEMMA --rows 256 --keeps 0.7 --seeds 0,1,2 --lrs 5e-5 --out gemma.jsonl \
    --methods "measured=" "uniform=allot:uniform"
$run --model GEMMA --rows 256 --keeps 0.7 --seeds 0 --lrs 1e-4,2e-4 --out gemma.jsonl \
    --methods "measured=" "uniform=allot:uniform"
""",
    "offsite_outer.jsonl": rf"""{_OFFSITE}
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out outer.jsonl --methods "outer 3=" --outer 3 \
    --source prompted --own-length 40
""",
    "offsite_own.jsonl": r"""
python -m lab.offsite --calibration ARC-Easy.train.json --text openbookqa.test.json --keeps 0.7 --steps 60 \
    --questions 100 --rows 1024 --source free --own-length 40 --methods free=allot:uniform --out own.jsonl
""",
    "offsite_rates.jsonl": rf"""{_OFFSITE}
$run --rows 256 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4,2e-4 --out rates.jsonl \
    --methods "measured=" "uniform=allot:uniform"
$run --rows 256 --keeps 0.7 --seeds 0 --lrs 1e-4,1e-3 --out rates.jsonl --methods "measured=" "uniform=allot:uniform"
$run --rows 32 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out rates.jsonl \
    --methods "32 rows=" "32 rows, uniform=allot:uniform"
$run --rows 1024 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out rates.jsonl --methods "1,024 rows="
$run --rows 256 --keeps 0.7 --seeds 0,1,2 --lrs 5e-4 --out default.jsonl \
    --methods "256=" --source prompted --own-length 40
""",
    "pays.jsonl": r"""
run="python -m lab.pays.run S1 --data FOLDER --workers 2 --out pays.jsonl --cells"
$run mix,reverse --seeds 0,1,2,3,4 --methods dense,few,target,target-gast "throughout=target,target-last:1"
$run mix --seeds 0,1,2,3,4 --methods oracle,untrained
$run mix --known 16 --seeds 0 --methods target,target-gast "throughout=target,target-last:1"
$run mix,reverse --models gemma3 --seeds 0 --methods dense,target,target-gast "throughout=target,target-last:1"
$run arithmetic-10,arc-25,boolq-25 --seeds 0 --methods dense,target,target-gast "throughout=target,target-last:1"
$run arc-25-wrong --known 64 --seeds 0 --methods dense,target,target-gast
run="python -m lab.pays.run S2 --data FOLDER --out pays.jsonl --cells uniform-30 --lrs 5e-4,1e-3 --steps 150"
$run --seeds 0,1,2 --methods dense "sample 12 of 16=method:gast,gast.support:sample,gast.select:12" \
    "random 12 of 16=method:gast,gast.support:rest,gast.choice:random,gast.select:12"
run="python -m lab.pays.run S5 --data FOLDER --out pays.jsonl --cells clean"
$run --methods dense,rst,ist --lrs 1e-3,2e-3 --seeds 0
$run --methods untrained --lrs 1e-3
$run --methods "half=rst,rst.active:0.5" "ist-half=ist,ist.active:0.5" --lrs 1e-3 --seeds 0
$run --methods dense --lrs 1e-3 --steps 1000 --seeds 0
python -m lab.pays.report lab/results/pays.jsonl --lr 5e-4 \
    --methods dense,dense+known-weighted,late-known    # mix: also ceiling
python -m lab.pays.report lab/results/pays.jsonl --lr 5e-4 --against late-known    # layers: --lr 1e-3
""",
    "letters.jsonl": """
run="python -m lab.pays.run S5 --data FOLDER --out letters.jsonl --cells clean-letters --models qwen1.5b --steps 40"
$run --methods dense ist gast --lrs 2e-4 --seeds 0,1    # dense and gast also --seeds 2 and --lrs 1e-4
$run --methods ist --lrs 5e-4 --seeds 0,1,2
$run --methods untrained half=gast,gast.select:0.5 --lrs 2e-4
$run --methods drawn=gast,gast.choice:random --lrs 2e-4 --seeds 0,1,2
$run --methods both=gast,method:ist+gast --lrs 5e-4
paper="dropout:0.05,no-completion-only:true"    # as in LLM-Adapters
$run --methods paper-dense=dense,$paper paper-gast=gast,gast.select:0.5,$paper paper-ist=ist,$paper --lrs 3e-4
$run --methods dense outer kit kit-uniform=kit,kit.allot:uniform --lrs 5e-4
$run --methods kit-paper=kit,kit.allot:uniform,kit.basis:svd,kit.mlp:channels --lrs 5e-4
$run --methods ist --lrs 1e-3
$run --methods rst --lrs 5e-4 --seeds 0,1,2
$run --methods dense --lrs 2e-4 --steps 57    # the time of gast with 40
$run --methods ist --lrs 5e-4 --steps 45      # the time of dense with 40
$run --models qwen0.5b --methods untrained outer kit --lrs 5e-4
$run --models qwen0.5b --methods kit-paper=kit,kit.allot:uniform,kit.basis:svd,kit.mlp:channels --lrs 5e-4
$run --cells clean --models qwen0.5b --methods untrained --lrs 5e-4
$run --cells clean --models qwen0.5b --methods dense gast ist --lrs 1e-4,2e-4,5e-4,1e-3
$run --cells clean --models qwen0.5b --methods dense gast ist --lrs 2e-4 --seeds 1,2
$run --cells clean --models qwen0.5b --lrs 2e-4 \
    --methods half=gast,gast.select:0.5 rst drawn=gast,gast.choice:random
""",
    "planted.jsonl": """
run="python -m lab.pays.run S1 --data FOLDER --out planted.jsonl --lrs 5e-4 --methods"
$run few target sifted --cells mix,reverse,arithmetic-10,boolq-25
$run target sifted --cells mix --known 16 --seeds 0,1,2
$run few --cells mix --known 16
python -m lab.pays.report planted.jsonl
""",
    "private.jsonl": """
run="python -m lab.pays.run S5 --data FOLDER --out private.jsonl --cells"
$run clean,clean-options,clean-boolq --lrs 2e-3 --seeds 0,1,2 --methods dp opacus
$run clean,clean-options,clean-boolq --lrs 2e-3 --methods dp-2=dp,dp_epsilon:2 opacus-2=opacus,dp_epsilon:2
$run clean --lrs 5e-4 --methods dense=dense,dtype:float32
$run clean-options,clean-boolq --lrs 5e-4 --seeds 0,1,2 --methods dense=dense,dtype:float32
""",
    "quality.jsonl": r"""
run="python -m lab.pays.run S2 --data FOLDER --out pays.jsonl --cells uniform-30 --lrs 5e-4,1e-3 --steps 150"
$run --seeds 0,1,2 --methods dense "sample 12 of 16=method:gast,gast.support:sample,gast.select:12"
""",
    "sift_scores.jsonl": """
run="python -m lab.pays.scores --data FOLDER --out sift_scores.jsonl"
$run intents-b    # also intents-a, intents-c, raters, mix, reverse
$run translations-el --rows 720 --model gemma3    # and qwen0.5b; also translations-bg
""",
    "scores.json": """
python -m lab.pays.scores intents-a --data FOLDER --out scores.jsonl    # similar: scores of what `siftune sift` records
""",
    "rows.jsonl": """
python -m lab.rows.run --cells mixed-25 --rows 920 --lr 1e-3 --data FOLDER --out rows.jsonl
run="python -m lab.rows.run --data FOLDER --out rows.jsonl --epochs 1 --cells"
$run intents-a,intents-b,intents-c,raters,raters-nyt,raters-amazon --rows 960
$run solutions --rows 240
$run translations-el --rows 240 --models gemma3
python -m lab.rows.run --cells intents-a --rows 960 --epochs 3 --data FOLDER --out rows.jsonl
python -m lab.rows.report lab/results/rows.jsonl
""",
}

# results of earlier code, and what they support
NOTES: dict[str, str] = {
    "audit.json": "Recorded from the table that `siftune audit` printed. Its attack on calibration rows was the "
    "option `--calibration` of commit 31be86d6.",
    "calibration_leak.json": "Recorded with an earlier script, the module lab.calibration_leak of commit 31be86d6, "
    "with the rows of ARC-Easy.train.json as the owner's and those of openbookqa.train.json as public ones.",
    "bench.json": "Recorded from the tables that `siftune bench` printed.",
    "natural.jsonl": "It supports docs/sifting.md, which README.md and docs/which_method.md quote. Lines of "
    "`sifted-base` were recorded by `siftune train --sift` when it began with the base. `retrieved`, `rds` in "
    "*tasks* and 210 steps of *intents-b* ran on a Xeon without AMX: their times do not compare with the others. "
    "Their rules choose as many rows as sifting did on seed 0. Pools of Qwen2.5-Coder-0.5B have 720 rows if trained "
    "for 45 steps, *tasks* 1,440. `sifted-twice` sifts the selected rows again; `sifted-tokens` trains on the 60 % of "
    "the label tokens whose loss falls most by the training on the target (Rho-1, Token Cleaning). Neither pays, and "
    "both are gone. SmolLM2's lines of *tasks-slots* at lr 5e-4, and Qwen's in float32, had a narrower limit of "
    "losses.",
    "avoid.jsonl": "Lines without `commit` are of earlier code, which had a second implementation of `--avoid`; their "
    "methods other than `dense`, `oracle` and `right late` are scores. They support docs/avoid.md, which is quoted in "
    "README.md and docs/which_method.md.",
    "pays.jsonl": "Lines without `commit` are of earlier code, which had second implementations of `--target` and "
    "`--sift`, an earlier score of rows, and methods that are gone. Target rows came up to 30 times each, now at most "
    "7, which concerns cells with fewer than 92 of them. `late-known` is now `target`, `late-gast-half` "
    "`target-gast`, `known-alone` `few`, and `oracle` replaces `ceiling`; `--layers` replaces what `upper-half` and "
    "`upper-three-quarters` used. They support target rows and layers in docs/measured_target.md and "
    "docs/measured_layers.md; docs/which_method.md; rates in docs/guide.md; and the table of README.md, but no figure "
    "of sifting.",
    "planted.jsonl": "Cells as in `pays`, with siftune's commands. It supports docs/sifting.md. The limit of losses "
    "changed at commit e28e21fa; in pools with older lines, it selects the same rows.",
    "letters.jsonl": "Answers are right if their letter is the likeliest of A to E, arithmetic (`clean`) if the number "
    "is written. Of 1,668 held-out questions, 28 begin like a training row that has other options. `outer` tunes a "
    "kit's layers on the model itself. It supports docs/measured_quality.md and docs/measured_kits.md, which other "
    "pages quote.",
    "scores.json": "Recorded with an earlier script, whose model was trained on the target alone.",
    "private.jsonl": "Lines without `commit` are of an earlier script on the same training path. They support "
    "docs/measured_privacy.md.",
    "quality.jsonl": "SmolLM2 on arithmetic, 2,400 rows in 150 steps of 16, lr 5e-4 unless named, rank 32, 300 "
    "questions for each of the seeds 0 to 2. `sample` and `random` select 8 of 16 rows unless named. Recorded with an "
    "earlier script; the commands above measure one of its cells again. It supports the quality of GAST in "
    "docs/measured_quality.md, which docs/which_method.md and README.md quote.",
    "commonsense_qwen.json": "Qwen2.5-Coder-1.5B without training, on 100 questions of each task, asked for the name "
    "of an option, its text or its letter. Recorded with `lab.reproduce` of the commit below. It supports "
    "docs/measured_quality.md.",
}
