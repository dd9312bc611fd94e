import pytest

from hemera.evaluation import published


@pytest.mark.parametrize("network", ["generation", "segmentation"])
def test_every_published_result_has_values_a_source_and_its_comparability(network):
    results = published.results(network)
    assert len({result["method"] for result in results}) == len(results)
    for result in results:
        values = {metric: result.get(metric) for metric in published.METRICS[network]}
        assert set(result) - set(values) == {"method", "source", "comparable"}
        assert any(float(value) > 0 for value in values.values() if value is not None)
