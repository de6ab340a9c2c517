package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// growthResults are the results of -growth, as -results stores them.
type growthResults struct {
	Machine string            `json:"machine"`
	Loads   map[string]result `json:"loads"` // by name
}

func readResults(path string) (r growthResults, err error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(content, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r growthResults) write(path string) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(content, '\n'), 0o644) //nolint:gosec // a page shows it
}

// drawResults draws the plots of stored results, into the directory of their file.
func drawResults(path string) error {
	results, err := readResults(path)
	if err != nil {
		return err
	}
	for _, g := range growths() {
		svg, err := g.draw(results)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), g.file()), []byte(svg), 0o644); err != nil { //nolint:gosec // a page shows it
			return err
		}
	}
	return nil
}

func (g growing) file() string { return "growth-" + g.name + ".svg" }

// The geometry of a plot, in pixels. All panels have the same size.
const (
	panelWidth, plotHeight = 410, 310
	areaLeft, areaRight    = 24, 386 // of a panel
	areaTop, areaBottom    = 74, 246
	labelAbove, labelBelow = -8, 17 // from a mark to its value
)

// colours are those of the lines. Like the gray of the text they have enough contrast on a white
// and on a black page, because the picture has no background.
var colours = []string{"#2f81d7", "#c9690f"}

const (
	gray = "#737b84"
	grid = "#80808038"
)

// draw returns the SVG of a table: its panels side by side. Both axes are logarithmic, and each
// mark has its value.
func (g growing) draw(results growthResults) (string, error) {
	var lines []string
	for _, p := range g.points {
		if _, ok := results.Loads[p.name]; !ok {
			return "", fmt.Errorf("no result of the load %s", p.name)
		}
		if !slices.Contains(lines, p.line) {
			lines = append(lines, p.line)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui, sans-serif" font-size="11" fill="%s">`+"\n",
		len(g.panels)*panelWidth, plotHeight, len(g.panels)*panelWidth, plotHeight, gray)
	fmt.Fprintf(&b, "<title>%s</title>\n", html.EscapeString(g.title))
	write(&b, areaLeft, 16, "start", ` font-size="14" font-weight="600"`, g.title)
	x := areaLeft
	for i, line := range lines {
		mark(&b, i, float64(x+5), 32)
		write(&b, x+14, 36, "start", "", line)
		x += 30 + 6*len(line)
	}
	for i, p := range g.panels {
		fmt.Fprintf(&b, "<g transform=\"translate(%d)\">\n", i*panelWidth)
		g.drawPanel(&b, p, lines, results)
		b.WriteString("</g>\n")
	}
	write(&b, areaLeft, plotHeight-8, "start", ` font-size="10"`, results.Machine+". Both scales are logarithmic.")
	b.WriteString("</svg>\n")
	return b.String(), nil
}

func (g growing) drawPanel(b *strings.Builder, p panel, lines []string, results growthResults) {
	value := func(pt point) float64 { return p.of(pt, results.Loads[pt.name]) }
	var at, values []float64
	for _, pt := range g.points {
		at, values = append(at, pt.at), append(values, value(pt))
	}
	across := logarithmic(slices.Min(at), slices.Max(at), areaLeft+16, areaRight-16)
	up := logarithmic(slices.Min(values), slices.Max(values), areaBottom-20, areaTop+16)

	write(b, areaLeft, areaTop-14, "start", ` font-weight="600"`, p.title)
	fmt.Fprintf(b, "<path d=\"M%d %dH%d\" stroke=\"%s\"/>\n", areaLeft, areaBottom, areaRight, gray)
	slices.Sort(at)
	for _, x := range slices.Compact(at) {
		fmt.Fprintf(b, "<path d=\"M%.1f %dV%d\" stroke=\"%s\"/>\n", across(x), areaTop, areaBottom, grid)
		write(b, int(across(x)), areaBottom+15, "middle", "", g.tick(x))
	}
	write(b, (areaLeft+areaRight)/2, areaBottom+32, "middle", "", g.axis)

	for i, line := range lines {
		var path []string
		for _, pt := range g.points {
			if pt.line == line {
				path = append(path, fmt.Sprintf("%.1f %.1f", across(pt.at), up(value(pt))))
			}
		}
		fmt.Fprintf(b, "<path d=\"M%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", strings.Join(path, "L"), colours[i])
		for _, pt := range g.points {
			if pt.line != line {
				continue
			}
			mark(b, i, across(pt.at), up(value(pt)))
			offset := labelAbove
			if slices.ContainsFunc(g.points, func(other point) bool {
				return other.at == pt.at && cmp.Or(cmp.Compare(value(other), value(pt)), strings.Compare(pt.line, other.line)) > 0
			}) {
				offset = labelBelow
			}
			write(b, int(across(pt.at)), int(up(value(pt)))+offset, "middle", fmt.Sprintf(" fill=%q", colours[i]), compact(value(pt)))
		}
	}
}

// logarithmic returns the scale that maps low to the pixel from, and high to to.
func logarithmic(low, high, from, to float64) func(float64) float64 {
	return func(v float64) float64 { return from + (to-from)*math.Log(v/low)/math.Log(high/low) }
}

// write writes a text whose baseline is at y.
func write(b *strings.Builder, x, y int, anchor, attributes, text string) {
	fmt.Fprintf(b, "<text x=\"%d\" y=\"%d\" text-anchor=%q%s>%s</text>\n", x, y, anchor, attributes, html.EscapeString(text))
}

// mark marks a point of a line: a disc, or a square for the second one.
func mark(b *strings.Builder, line int, x, y float64) {
	if line == 0 {
		fmt.Fprintf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=%q/>\n", x, y, colours[line])
		return
	}
	fmt.Fprintf(b, "<rect x=\"%.1f\" y=\"%.1f\" width=\"7\" height=\"7\" fill=%q/>\n", x-3.5, y-3.5, colours[line])
}

// compact returns a value with two or three digits.
func compact(v float64) string {
	switch {
	case v >= 999_500:
		return fmt.Sprintf("%.1fM", v/1e6)
	case v >= 9_950:
		return fmt.Sprintf("%.0fk", v/1e3)
	case v >= 999.5:
		return fmt.Sprintf("%.1fk", v/1e3)
	case v >= 9.95:
		return fmt.Sprintf("%.0f", v)
	default:
		return fmt.Sprintf("%.1f", v)
	}
}
