"""What the chat templates of Qwen's checkpoints make of a conversation: facts, checked by `tests/nightly`.

The conversation: a system turn SYSTEM, and a user turn of a picture and the text QUESTION, or of two pictures among
text. The key is the template in trl's `chat_templates`, which keeps the originals: qwen3_5_think is Qwen3.5's from 4B
on, qwen3_5_nothink that of its small ones, qwen3_vl the Instruct checkpoints'.
"""

ASKED = (
    "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>QUESTION"
    "<|im_end|>\n<|im_start|>assistant\n"
)
COMPARED = (
    "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nImage 1: <|vision_start|><|image_pad|><|vision_end|>\n"
    "Image 2: <|vision_start|><|image_pad|><|vision_end|>\nQUESTION<|im_end|>\n<|im_start|>assistant\n"
)
# template -> enable_thinking, None where it is left out -> what stands behind the user turn
OPENS = {
    "qwen3_5_think": {None: "<think>\n", True: "<think>\n", False: "<think>\n\n</think>\n\n"},
    "qwen3_5_nothink": {None: "<think>\n\n</think>\n\n", True: "<think>\n", False: "<think>\n\n</think>\n\n"},
    "qwen3_6": {None: "<think>\n", True: "<think>\n", False: "<think>\n\n</think>\n\n"},
    "qwen3_vl": {None: "", True: "", False: ""},
}
# the answer ANSWER behind ASKED, after the reasoning REASONING and after none
REASONED = "<think>\nREASONING\n</think>\n\nANSWER<|im_end|>\n"
ANSWERED = "<think>\n\n</think>\n\nANSWER<|im_end|>\n"
