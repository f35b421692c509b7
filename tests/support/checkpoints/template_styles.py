"""Chat templates written for the tests, each in the style of a family: what differs between them is what matters."""

TURNS = """\
{%- for m in messages %}{{ '<turn>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '</turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}"""

# Prints calls as JSON objects; knows no developer; shows reasoning of the last answer only.
JSON_CALLS = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role in ['system', 'user'] %}{{ '<turn>' + m.role + '\\n' + m.content + '</turn>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<turn>assistant\\n' }}
{%- if m.reasoning_content is string and (loop.last or loop.index0 > ns.last) %}
{{- '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content if m.content is string else '' }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}</call>' }}
{%- endfor %}
{{- '</turn>\\n' }}
{%- elif m.role == 'tool' %}{{ '<turn>user\\n<result>' + m.content + '</result></turn>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""

# One call per message, whose text it leaves out; results as JSON.
ONE_CALL = """\
{{- bos_token }}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time, please') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<head>assistant</head>{"name": "' ~ f.name ~ '", "parameters": ' ~ (f.arguments | tojson) ~ '}<end>' }}
{%- elif m.role == 'tool' %}{{ '<head>tool</head>' ~ (m.content | tojson) ~ '<end>' }}
{%- else %}{{ '<head>' ~ m.role ~ '</head>' ~ (m.content | trim) ~ '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<head>assistant</head>' }}{% endif %}"""

# Turns alternate, the system message comes first, ids have nine letters or digits.
STRICT = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ '[SYS]' + messages[0].content + '[/SYS]' }}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{ '[ASK]' + m.content + '[/ASK]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '[CALL]' + call.function.name + (call.function.arguments | tojson) + '#' + call.id }}
{%- endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '#' + m.tool_call_id + '[/RESULT]' }}
{%- else %}{{ raise_exception('no role ' + m.role + ' after the first message') }}
{%- endif %}
{%- endfor %}"""

# Arguments are joined as text, and calls are shown only beside null content; the last system message wins.
TEXT_CALLS = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<U>' + m['content'] }}
{%- elif m['role'] == 'assistant' and m['content'] is none %}
{%- for call in m['tool_calls'] %}
{{- '<C>' + call['function']['name'] + '\\n' + call['function']['arguments'] }}
{%- endfor %}
{%- elif m['role'] == 'assistant' %}{{ '<A>' + m['content'] + eos_token }}
{%- elif m['role'] == 'tool' %}{{ '<R>' + m['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<A>' }}{% endif %}"""

# Knows no system role and no tools.
NO_SYSTEM = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + '<stop>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"""

# Leaves out every role that it does not know, without a word.
SILENT = """\
{%- for m in messages %}
{%- if m.role == 'system' and m.content %}{{ '<s>' + m.content + '</s>' }}
{%- elif m.role == 'user' %}{{ '<u>' + m.content + '</u>' }}
{%- elif m.role == 'assistant' %}{{ '<a>' + m.content + '</a>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<a>' }}{% endif %}"""

# A developer message of its own at the start; later ones, and all but the first call, are left out.
DEVELOPER = """\
{{- 'effort: ' ~ (reasoning_effort or 'medium') ~ '\\n' }}
{%- if messages[0].role in ['developer', 'system'] %}
{%- set instructions = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- if instructions %}{{ '<|developer|>' ~ instructions ~ '<|end|>' }}{% endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{ '<|user|>' ~ m.content ~ '<|end|>' }}
{%- elif m.role == 'assistant' %}
{%- if m.thinking %}{{ '<|analysis|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}{{ '<|call|>' ~ call.name ~ call.arguments | tojson ~ '<|end|>' }}
{%- if m.content %}{{ '<|note|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- else %}{{ '<|final|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- elif m.role == 'tool' %}{{ '<|result|>' ~ m.content ~ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|final|>' }}{% endif %}"""

PARTS = """\
{%- for m in messages %}{{ '<' ~ m.role ~ '>' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '</>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

EITHER = """\
{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}
{%- for m in messages %}{{ '<' ~ m.role ~ '>' ~ text(m.content) ~ '</>' }}
{%- for call in m.tool_calls or [] %}{{ '<call>' ~ call.function.name ~ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

FIRST_PART = """\
{%- for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content[0].text ~ '</>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

STYLES = {
    "turns": TURNS,
    "json_calls": JSON_CALLS,
    "one_call": ONE_CALL,
    "strict": STRICT,
    "text_calls": TEXT_CALLS,
    "no_system": NO_SYSTEM,
    "silent": SILENT,
    "developer": DEVELOPER,
    "parts": PARTS,
    "either": EITHER,
    "first_part": FIRST_PART,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
