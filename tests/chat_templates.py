"""Chat templates of three kinds, and a conversation."""

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
#: Takes the thoughts of all answers but the last away, as Qwen3's does.
FORGETFUL = """{%- for message in messages %}
    {{- message['role'] + ': ' }}
    {{- message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt du? 🧵"},
    {"role": "assistant", "content": " Heddle, größer als dreißig 🧵🧵"},
    {"role": "user", "content": "and again"},
    {"role": "assistant", "content": "<think>hm</think>Heddle"},
]
