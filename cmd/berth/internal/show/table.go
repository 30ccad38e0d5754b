package show

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/vbauerster/mpb/v8/decor"
)

// Table writes rows under a head, in columns.
func Table(w io.Writer, head []string, rows [][]string) error {
	return Rows(w, append([][]string{head}, rows...))
}

// Rows writes rows in columns. Control characters in cells, which may be a registry's words, are escaped.
func Rows(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			cells[i] = Plain(cell)
		}
		if _, err := fmt.Fprintln(t, strings.TrimRight(strings.Join(cells, "\t"), "\t ")); err != nil {
			return err
		}
	}
	return t.Flush()
}

// Plain returns text without characters that steer a terminal.
func Plain(s string) string {
	if !strings.ContainsFunc(s, unprintable) {
		return s
	}
	return strings.Trim(strconv.Quote(s), `"`)
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// Size writes a number of bytes for people, or exactly.
func Size[N int64 | uint64](n N, exact bool) string {
	if exact {
		return strconv.FormatUint(uint64(max(n, 0)), 10)
	}
	if n < 1000 {
		return strconv.FormatInt(max(int64(n), 0), 10) + "B"
	}
	return fmt.Sprintf("%.1f", decor.SizeB1000(int64(min(uint64(max(n, 0)), 1<<63-1))))
}
