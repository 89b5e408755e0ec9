"""The measurement of loading: a whole model comes back in a process of its own, and its memory is counted."""

from conftest import load_recipe, small_config


def test_a_model_is_loaded_and_its_memory_counted(tmp_path, capsys):
    small_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=8).save_pretrained(tmp_path)
    recipe = load_recipe("benchmark/load.py")
    found = recipe.main(recipe.LoadArguments(model_config=str(tmp_path), layers=4, max_shard_size="2MB"))
    parameters = 4 * 12 * 256**2 + (632 + 96) * 256
    assert (found["dtype"], found["weights"]) == ("torch.bfloat16", 2 * parameters)
    assert found["peak"] > 0 and found["ratio"] == round(found["peak"] / found["weights"], 3)
    assert '"ratio"' in capsys.readouterr().out
