"""IST in a plain transformers Trainer: SmolLM2 and a handful of steps on arithmetic, as your own script would do it."""

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from siftune import IST
from siftune.data.arithmetic import arithmetic_rows
from siftune.data.rows import rows_from
from siftune.data.tokenize import Collator, tokenize_rows
from siftune.models.source import load_model

model, tokenizer = load_model("smollm2")
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = tokenize_rows(rows_from(arithmetic_rows(400, seed=0)), tokenizer, max_length=64, template="none")

method = IST(active=0.25)
trainer = Trainer(
    model,
    TrainingArguments("runs/example", per_device_train_batch_size=8, max_steps=30, learning_rate=2e-3, logging_steps=5),
    train_dataset=rows,
    data_collator=Collator(tokenizer.pad_token_id),
    callbacks=[method],
)
trainer.train()
print("layers by importance, highest first:", method.importance.argsort(descending=True).tolist())
