"""Solutions of every form that stands in R1-V's test sets, GeoQA and SuperCLEVR."""

from pathlib import Path

DATA = Path(__file__).parents[4] / "shared" / "data"

_LISTED = r"""
140° 65° 55° 27° 3cm 72° 12 5m 115° 9米 17.5° 40cm 13m √{3} 8√{3} 2√{3} 128° 6√{2} \frac{12}{5} 6
2√{15}米 2.4 \frac{1}{2}cm² 4πcm 65π 2√{2}cm 240πcm^{2} 9πcm^{2} 2400πcm^{2} 15π 50πm^{2} 10√{2}
2√{13} 10.2米 120m 10.8m 0.5米 \frac{9}{5} 75cm 3.42m \frac{24}{5}cm \frac{4}{3}米 6.00米
\frac{20}{3} \frac{40}{7}米 5.1 4.40米 27cm^{2} \frac{3}{5} \frac{4}{5} \frac{√{3}}{2} \frac{5}{13}
\frac{2√{5}}{5} \frac{√{2}}{2} \frac{1}{3} 145° 5√{3} 2√{2}-2 \frac{3}{2}√{3} 12√{3}cm √{5}
16π平方米 \frac{36}{5} 4π 2π \frac{6}{5}√{10} \frac{20}{7}cm 4.5 \frac{15}{2} 1.2 58米 240° 4.5cm
19cm 4√{3} 6√{3}海里 3.6秒 5cm^2^ 25cm 8厘米 40海里 \frac{1}{6}π 3π π 3√{5}米 (√{3}+1)小时
20√{2}海里 30√{3}m 7√{2}海里 400cm² \frac{16}{5} \frac{3√{5}}{2} 6√{2}-6 √{13} 160√{3}m
60√{3}+1 100√{3}m 6√{3}米
4√{3}cm² \frac{2}{5}√{5} 24米 \frac{10√{3}}{3}m \frac{24}{7} 22.5° 3mm 9π 0 1 2 3 4 5 7 8 9 10
"""
SOLUTIONS = _LISTED.split()
