{{- define "poolrpc.name" -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "poolrpc.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "poolrpc.labels" -}}
{{ include "poolrpc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The releases' tags: VERSION, and VERSION-cuda for GPUs. */}}
{{- define "poolrpc.image" -}}
{{- $variant := ternary "-cuda" "" (gt (int .Values.gpu.count) 0) -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (print .Chart.AppVersion $variant) }}
{{- with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}
