"""What processes of their own say."""

from hpcai_cli.engine.environment.own_process import json_lines


def test_json_is_found_between_what_launchers_write():
    output = ('a warning\n[1,0]<stdout>:{"findings": [1, [1,0]<stdout>:2]}\n[1]<stdout>:{"name": "b"}\n{"torn":\n'
              '{"name": "c"}\n')
    assert json_lines(output) == [{"findings": [1, 2]}, {"name": "b"}, {"name": "c"}]
